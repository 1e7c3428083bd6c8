"""TRIME's losses over two processes against one that holds the whole batch."""

from types import SimpleNamespace

import pytest
import torch
from small_models import ADAPTIVE, make_batch, make_model
from small_translation import make_pairs, make_translation_model
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from fairseq.criterions.base import build_criterion
from fairseq.data.types import LMBatch, TranslationBatch
from fairseq.memory.scoring import joint_nll
from fairseq.memory.trime.visibility import ELSEWHERE, EXTERNAL, LONG, VisibilityRule
from fairseq.runtime.distributed import gather_ragged
from fairseq.trainer import LossModule

# name -> criterion, its flags, ranks_per_memory, rows of each rank's batch, how a single process sees the whole
CASES = {
    "external": ("trime_ext_loss", {"gather_grad": True}, None, ((7, 4), (6, 7)), EXTERNAL),
    "external, ragged": ("trime_ext_loss", {"gather_grad": True}, None, ((7, 4, 2), (5,)), EXTERNAL),
    "external, no own past": (
        "trime_ext_loss",
        {"gather_grad": True, "cross_sent_ratio": 1.0},
        None,
        ((7,), (4, 3)),
        VisibilityRule(own_past=False, earlier=True, later=True),
    ),
    "external, one rank without work": ("trime_ext_loss", {"gather_grad": True}, None, ((7, 4), ()), EXTERNAL),
    "long": ("trime_long_loss", {"gather_grad": True}, None, ((7, 7), (7, 7)), LONG),
    "long, ragged": ("trime_long_loss", {"gather_grad": True}, None, ((7, 7), (3,)), LONG),
    "long, first rank without work": ("trime_long_loss", {"gather_grad": True}, None, ((), (7, 3)), LONG),
    "long, gradients stay": ("trime_long_loss", {}, None, ((7, 5), (6,)), LONG),
    "external, gradients stay": ("trime_ext_loss", {}, None, ((7, 5), (6,)), EXTERNAL),
    "long, each rank its own text": ("trime_long_loss", {"gather_grad": True}, 1, ((7, 5), (6, 2)), None),
    "long, same device": ("trime_long_loss_same_device", {}, None, ((7, 5), (6, 2)), None),
    "local": ("trime_loss", {}, None, ((7, 5), (6, 2)), None),
}
MT_CASES = {
    "all memories": ({"gather_grad": True, "temp": 2.0}, ((7, 4), (6, 7))),
    "the nearest": ({"gather_grad": True, "topk_mem": 3}, ((7, 4, 2), (5,))),
    "by distance": ({"gather_grad": True, "topk_mem": 3, "dist_func": "l2"}, ((7, 4), (6,))),
    "one rank without work": ({"gather_grad": True, "topk_mem": 3}, ((7, 4), ())),
    "gradients stay": ({"topk_mem": 3}, ((7, 4), (6, 5))),
    "gradients stay, by distance": ({"dist_func": "l2"}, ((7, 4), (6, 5))),
}


def batches_of(lengths_per_rank):
    return [
        make_batch(lengths, seed=10 + rank) if lengths else LMBatch.empty()
        for rank, lengths in enumerate(lengths_per_rank)
    ]


def pairs_of(lengths_per_rank):
    return [make_pairs(lengths, seed=20 + rank) for rank, lengths in enumerate(lengths_per_rank)]


def run_rank(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for case, (name, given, ranks_per_memory, lengths, _) in CASES.items():
        model = make_model(**ADAPTIVE)
        criterion = build_criterion(name, given, model)
        criterion.ranks_per_memory = ranks_per_memory
        wrapped = DistributedDataParallel(LossModule(model, criterion))
        loss, _ = wrapped(LMBatch, *batches_of(lengths)[rank].parts())
        loss.backward()
        model.eval()
        with torch.inference_mode():
            again, _ = wrapped(LMBatch, *batches_of(lengths)[rank].parts())
        # Data parallelism takes the mean over ranks; the trainer undoes that, so here too.
        gradients = [2 * p.grad for p in model.parameters()]
        found[case] = {"loss": loss.detach(), "eval": again.clone(), "gradients": gradients}
    for case, (given, lengths) in MT_CASES.items():
        model = make_translation_model()
        wrapped = DistributedDataParallel(LossModule(model, build_criterion("trime_mt_loss", given, model)))
        loss, _ = wrapped(TranslationBatch, *pairs_of(lengths)[rank].parts())
        loss.backward()
        found[f"mt {case}"] = {"loss": loss.detach(), "gradients": [2 * p.grad for p in model.parameters()]}
    own = torch.arange(6.0).view(3, 2)[: 3 - 2 * rank].add(10 * rank).requires_grad_()
    gathered = gather_ragged(own, torch.arange(len(own)) + 100 * rank, with_gradient=True)
    rows, numbers = gathered.tensors
    (rows * (rank + 1)).sum().backward()
    found["gather"] = {"counts": gathered.counts, "rows": rows.detach(), "numbers": numbers, "grad": own.grad}
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def one_process(batches, rule, given):
    """Loss and gradients of a process that holds all batches, by the plain formula.

    Without --gather-grad, memories of other ranks are constants.
    """
    model = make_model(**ADAPTIVE)
    parts = []
    for rank, batch in enumerate(batches):
        out = model(batch.tokens_BT, key_tap="last_ffn_input")
        hidden_ND, key_ND, target_N = (x[batch.scored_BT] for x in (out.hidden_BTD, out.key_BTD, batch.target_BT))
        lengths = batch.scored_BT.sum(1).tolist()
        rank_N = torch.full_like(target_N, rank)
        parts.append((*model.target_logp(hidden_ND, target_N), key_ND, target_N, rank_N, lengths))
    logp_N, norm_N, key_ND, target_N, rank_N = (torch.cat(x) for x in list(zip(*parts))[:5])
    scores_NN = key_ND @ key_ND.T
    if not given.get("gather_grad"):
        scores_NN = torch.where(rank_N[:, None] == rank_N, scores_NN, key_ND @ key_ND.detach().T)
    keep_NN = rule.mask([length for *_, lengths in parts for length in lengths])
    same_NN = target_N[:, None] == target_N
    loss = joint_nll(logp_N, norm_N, scores_NN / key_ND.shape[1] ** 0.5, keep_NN, same_NN).sum()
    loss.backward()
    return SimpleNamespace(loss=loss.detach(), gradients=[p.grad for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES))
def test_two_ranks_are_one_process_with_the_whole_batch(ranks, case):
    name, given, _, lengths, rule = CASES[case]
    batches = batches_of(lengths)
    ours = [found[case] for found in ranks]
    if rule is None:  # nothing is shared: each rank by itself
        model = make_model(**ADAPTIVE)
        criterion = build_criterion(name, {}, model)
        losses = [criterion(model, batch).sum for batch in batches]
        sum(losses).backward()
        whole = SimpleNamespace(loss=sum(losses).detach(), gradients=[p.grad for p in model.parameters()])
    else:
        whole = one_process(batches, rule, given)
    torch.testing.assert_close(sum(x["loss"] for x in ours), whole.loss, rtol=1e-9, atol=1e-9)
    for rank in range(2):
        torch.testing.assert_close(ours[rank]["gradients"], whole.gradients, rtol=1e-8, atol=1e-8)
    if given.get("cross_sent_ratio", 0) == 0:
        torch.testing.assert_close(sum(x["eval"] for x in ours), whole.loss, rtol=1e-9, atol=1e-9)


def one_process_mt(batches, given):
    """Loss and gradients by the formula over all sentences; without --gather-grad, those of other ranks are fixed."""
    model = make_translation_model()
    parts = []
    for rank, batch in enumerate(batches):
        out = model(batch.tokens_BT, **batch.source)
        key_ND, target_N = (x[batch.scored_BT] for x in (out.hidden_BTD, batch.target_BT))
        rank_N = torch.full_like(target_N, rank)
        parts.append((*model.target_logp(key_ND, target_N), key_ND, target_N, rank_N, batch.scored_BT.sum(1).tolist()))
    logp_N, norm_N, key_ND, target_N, rank_N = (torch.cat(x) for x in list(zip(*parts))[:5])
    same_rank_NN = rank_N[:, None] == rank_N

    def similarities(key_MD):
        return key_ND @ key_MD.T if given.get("dist_func") != "l2" else -(key_ND[:, None] - key_MD).square().sum(2)

    scores_NN = similarities(key_ND)
    if not given.get("gather_grad"):
        scores_NN = torch.where(same_rank_NN, scores_NN, similarities(key_ND.detach()))
    keep_NN = ELSEWHERE.mask([length for *_, lengths in parts for length in lengths])
    if "topk_mem" in given:
        nearest_NK = scores_NN.masked_fill(~keep_NN, -torch.inf).topk(given["topk_mem"], dim=1).indices
        keep_NN &= torch.zeros_like(keep_NN).scatter(1, nearest_NK, value=True)
    scale = key_ND.shape[1] ** -0.5 / given.get("temp", 1.0)
    loss = joint_nll(logp_N, norm_N, scores_NN * scale, keep_NN, target_N[:, None] == target_N).sum()
    loss.backward()
    return SimpleNamespace(loss=loss.detach(), gradients=[p.grad for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(MT_CASES))
def test_translation_on_two_ranks_is_one_process_with_all_sentences(ranks, case):
    given, lengths = MT_CASES[case]
    ours = [found[f"mt {case}"] for found in ranks]
    whole = one_process_mt(pairs_of(lengths), given)
    torch.testing.assert_close(sum(x["loss"] for x in ours), whole.loss, rtol=1e-9, atol=1e-9)
    for found in ours:
        torch.testing.assert_close(found["gradients"], whole.gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_rows_of_ranks_are_joined_in_order_and_gradients_return(ranks):
    for rank, found in enumerate(ranks):
        gathered = found["gather"]
        assert gathered["counts"] == (3, 1)
        assert gathered["rows"].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11]]
        assert gathered["numbers"].tolist() == [0, 1, 2, 100]
        # Both ranks used every row, one of them twice.
        assert gathered["grad"].tolist() == [[3, 3]] * (3 - 2 * rank)


def test_one_process_gathers_its_own():
    own = torch.arange(3.0)
    gathered = gather_ragged(own)
    assert gathered.counts == (3,)
    assert gathered.tensors[0] is own
