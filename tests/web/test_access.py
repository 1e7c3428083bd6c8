import pytest

from fairseq.web.access import LOOPBACK_NAMES, Access

OPEN, CLOSED = Access(LOOPBACK_NAMES), Access(None, token="s3cret", open_paths=frozenset({"/health"}))


def status(access, path="/", query=b"", **headers):
    refusal = access.refusal(path, query, headers)
    return None if refusal is None else refusal[0]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_loopback_names_are_answered(host):
    assert status(OPEN, host=host) is None


@pytest.mark.parametrize("host", ["example.com", "example.com:8000", "127.0.0.1.example.com", "", "[::2]:80", "[::1]x"])
def test_a_name_that_points_here_is_rejected(host):
    assert status(OPEN, host=host) == 421


def test_no_host_header_is_rejected():
    assert status(OPEN) == 421


@pytest.mark.parametrize(
    "origin", ["http://example.com", "null", "http://localhost:9000", "http://127.0.0.1:8000", "http://["]
)
def test_pages_of_others_are_rejected(origin):
    assert status(OPEN, host="localhost:8000", origin=origin) == 403


def test_the_own_page_is_answered():
    assert status(OPEN, host="localhost:8000", origin="http://localhost:8000") is None


def test_token_in_the_header_or_in_the_address():
    assert status(CLOSED, host="any") == 401
    assert status(CLOSED, host="any", authorization="Bearer wrong") == 401
    assert status(CLOSED, host="any", authorization="Basic s3cret") == 401
    assert status(CLOSED, host="any", query=b"token=wrong") == 401
    assert status(CLOSED, host="any", authorization="bearer s3cret") is None
    assert status(CLOSED, host="any", query=b"a=1&token=s3cret") is None


def test_a_token_of_other_letters_is_wrong_and_no_error():
    assert status(CLOSED, host="any", authorization="Bearer \xe9") == 401


def test_open_paths_need_no_token():
    assert status(CLOSED, "/health", host="any") is None
    assert status(CLOSED, "/health/", host="any") == 401


def test_any_name_needs_a_token():
    with pytest.raises(AssertionError):
        Access(None)
