"""Vocabulary-parallel cross entropy against torch's: values and gradients, padding, precision, in-place behaviour."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from harness.ranks import run_ranks
from megatron.kernels import reference
from megatron.kernels.kernels import TORCH
from megatron.layers.cross_entropy import cross_entropy, mean_loss
from megatron.layers.vocabulary import Vocabulary
from megatron.parallel.context import ParallelContext, build_context
from megatron.ucp.topology import Topology

ALONE = ParallelContext.single()


def _parallel(rank, world_size, logits, labels, upstream, padded_size, fault):
    context = build_context(Topology(tp_size=world_size)) if world_size > 1 else ParallelContext.single()
    vocabulary = Vocabulary(logits.shape[-1], padded_size, context)
    stop = vocabulary.start + vocabulary.num_true
    own = F.pad(logits[..., vocabulary.start : stop], (0, vocabulary.size - vocabulary.num_true)).requires_grad_()
    if fault == "unmasked":
        vocabulary.num_true = vocabulary.size
    consumed = own * 1.0
    nll = cross_entropy(consumed, labels, vocabulary)
    nll.backward(upstream)
    return nll.detach(), own.grad[..., : stop - vocabulary.start], own.grad[..., stop - vocabulary.start :]


def _case(dtype=torch.float64, vocabulary=101):
    generator = torch.Generator().manual_seed(5)
    logits = (30 * torch.randn(2, 7, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocabulary, (2, 7), generator=generator)
    labels[0, 0], labels[0, 1] = 0, vocabulary - 1
    upstream = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    plain = logits.double().clone().requires_grad_()
    nll = F.cross_entropy(plain.transpose(1, 2), labels, reduction="none")
    nll.backward(upstream)
    return (logits, labels, upstream), nll.detach(), plain.grad


# padded to 128 a rank, ranks 1 and 2 of 101 words have nothing but padding; to 48 and 36, every rank has words
@pytest.mark.parametrize("padded_size", [128, 48 * 3])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_values_and_gradients(tp_size, padded_size):
    given, nll, grad = _case()
    results = run_ranks(tp_size, _parallel, *given, padded_size * (tp_size if padded_size == 128 else 1), None)
    for result, _, padding in results:
        torch.testing.assert_close(result, nll, rtol=1e-12, atol=1e-10)
        assert not padding.any()
    torch.testing.assert_close(torch.cat([part for _, part, _ in results], -1), grad, rtol=1e-9, atol=1e-12)


def test_fault_unmasked_padding_changes_the_loss():
    (logits, labels, upstream), nll, _ = _case()
    given = logits / 30, labels, upstream
    masked, unmasked = (run_ranks(1, _parallel, *given, 128, fault)[0][0] for fault in (None, "unmasked"))
    assert (unmasked - masked).min() > 0.05


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_label_outside_the_vocabulary_gives_nan_and_not_a_wrong_number(tp_size):
    (logits, labels, upstream), nll, _ = _case()
    labels[0, 3], labels[1, 2] = 101, -1  # the first is a padding column
    for found, _, _ in run_ranks(tp_size, _parallel, logits, labels, upstream, 128, None):
        assert found.isnan().nonzero().tolist() == [[0, 3], [1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_rows_change_nothing(monkeypatch, dtype):
    given, _, _ = _case(dtype)
    given = *given[:2], given[2].float()
    whole = _parallel(0, 1, *given, 128, None)
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE_CPU", 300)
    for expected, found in zip(whole, _parallel(0, 1, *given, 128, None)):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits_give_an_fp32_loss(dtype, tp_size):
    given, nll, grad = _case(dtype)
    results = run_ranks(tp_size, _parallel, *given[:2], given[2].float(), 128, None)
    found_grad = torch.cat([part for _, part, _ in results], -1)
    assert found_grad.dtype == dtype and all(not padding.any() for _, _, padding in results)
    torch.testing.assert_close(found_grad.double(), grad, rtol=1e-2, atol=1e-5)
    for found, _, _ in results:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), nll, rtol=1e-5, atol=1e-4)


class _LargestFloats(TorchDispatchMode):
    """Elements of the largest fp32 tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if torch.is_tensor(tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return found


def _largest_floats(step, *args) -> int:
    with _LargestFloats() as largest:
        step(*args)
    return largest.numel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_fp32_copy_of_low_precision_logits(dtype, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE_CPU", 300)
    given, _, _ = _case(dtype)
    assert _largest_floats(_parallel, 0, 1, *given[:2], given[2].float(), 101, None) == 2 * 101
    # the checker itself: a kernel that copies is noticed
    copying = replace(
        TORCH, cross_entropy_statistics=lambda logits, *args: TORCH.cross_entropy_statistics(logits.float(), *args)
    )
    copied = given[0].clone()
    assert _largest_floats(cross_entropy, copied, given[1], Vocabulary(101, 101, ALONE), copying) == 2 * 7 * 101


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_consumed_and_backward_runs_once(dtype):
    given, _, _ = _case(dtype)
    vocabulary = Vocabulary(101, 101, ParallelContext.single())
    logits = given[0].clone().requires_grad_() * 1.0
    address = logits.data_ptr()
    gradients = []
    logits.register_hook(gradients.append)
    loss = cross_entropy(logits, given[1], vocabulary).sum()
    loss.backward(retain_graph=True)
    assert gradients[0].data_ptr() == address
    with pytest.raises(RuntimeError, match="no second one"):
        loss.backward()


def test_mean_loss_is_by_sequence_and_so_independent_of_micro_batches():
    nll = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert mean_loss(nll, mask, ALONE).item() == pytest.approx((1.5 + 8.0 + 0.0) / 3)
    singly = [mean_loss(nll[i : i + 1], mask[i : i + 1], ALONE).item() for i in range(3)]
    assert sum(singly) / 3 == pytest.approx(mean_loss(nll, mask, ALONE).item())
    assert mean_loss(nll, torch.ones_like(nll), ALONE).item() == pytest.approx(mean_loss(nll, None, ALONE).item())
