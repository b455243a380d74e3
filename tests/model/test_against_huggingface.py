"""The whole model against transformers' GPT2LMHeadModel with the same weights: an implementation not ours."""

import pytest
import torch
from model.tiny_gpt import VOCABULARY, batch, build, config, merged

from harness.ranks import run_ranks
from megatron.ucp.topology import Topology

TOLERANCE = 2e-5


def _run(rank, world_size, untied, is_pipelined):
    topology = Topology(tp_size=world_size)
    model, _, _ = build(topology, config(untie_embeddings_and_output_weights=untied), is_pipelined)
    with torch.no_grad():
        # Biases and norms away from 0 and 1, or a mistake in them would not show. Their pattern is the same on all
        # ranks where they are replicated, and follows the global column where they are cut.
        for name, param in model.named_parameters():
            if param.dim() == 1:
                layout = param.atomic_layout
                atom = torch.linspace(-0.3, 0.4, layout.numel) + (1.0 if "norm.weight" in name else 0.0)
                param.copy_(layout.split(atom, param.shard_rank))
    tokens, labels, mask = batch()
    logits = model.logits(tokens).detach()
    loss, unmasked = model(tokens, labels, mask), model(tokens, labels).detach()
    loss.backward()
    layouts = {name: param.atomic_layout for name, param in model.named_parameters()}
    grads = {name: param.grad for name, param in model.named_parameters()}
    weights = {name: param.detach() for name, param in model.named_parameters()}
    return logits, loss.detach(), unmasked, weights, grads, layouts


def _huggingface(atoms, untied):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = config()
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=32,
            n_layer=model.num_layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=1e-5,
            tie_word_embeddings=not untied,
            attn_implementation="eager",
        )
    )
    theirs = dict(reference.named_parameters())
    with torch.no_grad():
        for name, param in theirs.items():
            # Conv1D keeps [in, out], torch's Linear [out, in].
            atom = atoms[_canonical(name)]
            param.copy_(atom.T if _is_conv(name) else atom)
    return reference.train(), theirs


def _canonical(name):
    for theirs, ours in (
        ("transformer.wte", "embedding.word_embeddings"),
        ("transformer.wpe", "embedding.position_embeddings"),
        ("transformer.h.", "layers."),
        ("ln_1", "input_norm"),
        ("ln_2", "post_attention_norm"),
        ("attn.c_attn", "attention.query_key_value"),
        ("attn.c_proj", "attention.dense"),
        ("mlp.c_fc", "mlp.dense_h_to_4h"),
        ("mlp.c_proj", "mlp.dense_4h_to_h"),
        ("transformer.ln_f", "final_norm"),
    ):
        name = name.replace(theirs, ours)
    return name


def _is_conv(name):
    return "c_" in name and name.endswith("weight")


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_logits_loss_and_gradients(tp_size, untied):
    results = run_ranks(tp_size, _run, untied, False)
    topology = Topology(tp_size=tp_size)
    layouts = [result[5] for result in results]
    atoms = merged([result[3] for result in results], layouts, topology)
    grads = merged([result[4] for result in results], layouts, topology)
    reference, theirs = _huggingface(atoms, untied)
    assert {_canonical(name) for name in theirs} == set(atoms)
    tokens, labels, mask = batch()
    expected = reference(tokens).logits
    nll = torch.nn.functional.cross_entropy(expected.transpose(1, 2), labels, reduction="none")
    loss = ((nll * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    for logits, ours, unmasked, *_ in results:
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
        assert ours.item() == pytest.approx(loss.item(), abs=TOLERANCE)
        assert unmasked.item() == pytest.approx(nll.mean().item(), abs=TOLERANCE)
    for name, param in theirs.items():
        grad = param.grad.T if _is_conv(name) else param.grad
        torch.testing.assert_close(grads[_canonical(name)], grad, rtol=1e-4, atol=TOLERANCE)
    # a fault that the comparison must see: the values of two heads exchanged
    weight = atoms["layers.1.attention.query_key_value.weight"]
    weight[64:80] = weight[64:80].roll(8, 0)
    broken, _ = _huggingface(atoms, untied)
    assert (broken(tokens).logits - expected).abs().max() > 50 * TOLERANCE
