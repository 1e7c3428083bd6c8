"""Errors that a client sees, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is not answered: HTTP status, reason, and the field it is about.

    ```python
    raise ApiError(404, "there is no store 'a'; the stores: b", param="store", code="store_not_found")
    ```
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
