"""Whole tiny models of each family against transformers' with the same weights: logits, loss and all gradients.

PhiMoE is in ucp/test_ucp_huggingface.py: in training its experts are drawn by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from model.tiny_gpt import FAMILIES, VOCABULARY, batch, build, config, merged

from harness.ranks import run_ranks
from megatron.ucp.topology import Topology

TOLERANCE = 2e-5


@dataclass(frozen=True)
class Family:
    reference: Callable
    """() -> (configuration's class, model's class)"""
    given: dict
    """To the configuration, beside what the model's shape says."""
    convert: Callable
    """(atoms, model) -> parameters by transformers' names; linear, so that it converts gradients too."""
    fault: Callable
    """(atoms, model): a mistake that must be seen, made in place."""


# -- names and shapes -------------------------------------------------------------------------------------------------


def _parts_of_qkv(atom, model):
    d = model.head_dim
    return atom.split([n * d for n in (model.num_attention_heads, *[model.num_key_value_heads] * 2)])


def _of_llama(atoms, model):
    found = {
        "model.embed_tokens.weight": atoms["embedding.word_embeddings.weight"],
        "model.norm.weight": atoms["final_norm.weight"],
    }
    if model.untie_embeddings_and_output_weights:
        found["lm_head.weight"] = atoms["lm_head.weight"]
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."

        def mlp(from_, to, ours=ours, theirs=theirs):
            gate, up = atoms[f"{ours}{from_}.dense_h_to_4h.weight"].chunk(2)
            found[f"{theirs}{to}.gate_proj.weight"], found[f"{theirs}{to}.up_proj.weight"] = gate, up
            found[f"{theirs}{to}.down_proj.weight"] = atoms[f"{ours}{from_}.dense_4h_to_h.weight"]

        for name, part in zip("qkv", _parts_of_qkv(atoms[ours + "attention.query_key_value.weight"], model)):
            found[f"{theirs}self_attn.{name}_proj.weight"] = part
        found[theirs + "self_attn.o_proj.weight"] = atoms[ours + "attention.dense.weight"]
        if model.qk_layernorm:
            found[theirs + "self_attn.q_norm.weight"] = atoms[ours + "attention.query_norm.weight"]
            found[theirs + "self_attn.k_norm.weight"] = atoms[ours + "attention.key_norm.weight"]
        for from_, to in (("input_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")):
            found[f"{theirs}{to}.weight"] = atoms[f"{ours}{from_}.weight"]
        if model.num_experts_of(layer) == 1:
            mlp("mlp", "mlp")
            continue
        found[theirs + "mlp.gate.weight"] = atoms[ours + "mlp.router.weight"]
        found[theirs + "mlp.experts.gate_up_proj"] = atoms[ours + "mlp.experts.dense_h_to_4h"]
        found[theirs + "mlp.experts.down_proj"] = atoms[ours + "mlp.experts.dense_4h_to_h"]
        if model.moe_shared_expert_intermediate_size:
            mlp("mlp.shared_expert", "mlp.shared_experts")
    return found


_BLOOM = (
    ("embedding.word_embeddings.", "transformer.word_embeddings."),
    ("embedding.norm.", "transformer.word_embeddings_layernorm."), ("layers.", "transformer.h."),
    ("attention.", "self_attention."), ("final_norm.", "transformer.ln_f."),
)  # fmt: skip
_NEOX = (
    ("embedding.word_embeddings.", "gpt_neox.embed_in."), ("layers.", "gpt_neox.layers."),
    ("final_norm.", "gpt_neox.final_layer_norm."),
)  # fmt: skip


def _fused_by_head(renamings):
    def convert(atoms, model):
        found = {}
        for name, atom in atoms.items():
            for ours, theirs in renamings:
                name = name.replace(ours, theirs) if name.startswith(ours) or ours == "attention." else name
            for norm in ("input", "post_attention"):
                name = name.replace(f".{norm}_norm.", f".{norm}_layernorm.")
            if "query_key_value" in name:  # q, k and v of the first head, then of the second, ...
                parts = [part.unflatten(0, (-1, model.head_dim)) for part in _parts_of_qkv(atom, model)]
                atom = torch.stack(parts, dim=1).flatten(0, 2)
            found[name] = atom
        return found

    return convert


# -- faults -----------------------------------------------------------------------------------------------------------


def _two_heads_exchanged(atoms, model):
    """Their values."""
    v = _parts_of_qkv(atoms["layers.1.attention.query_key_value.weight"], model)[2]
    v.copy_(v.roll(model.head_dim, 0))


def _two_experts_exchanged(atoms, model):
    up = atoms["layers.1.mlp.experts.dense_h_to_4h"]
    up.copy_(up[[1, 0, 2, 3]])


def _gate_and_up_exchanged(atoms, model):
    up = atoms["layers.1.mlp.dense_h_to_4h.weight"]
    up.copy_(torch.cat(up.chunk(2)[::-1]))


def _query_norm_left_out(atoms, model):
    atoms["layers.1.attention.query_norm.weight"].fill_(1.0)


def _first_head_last(atoms, model):
    """Of queries, keys and values alike, and of what the output makes of them: only ALiBi's rates tell."""
    for part in _parts_of_qkv(atoms["layers.1.attention.query_key_value.weight"], model):
        part.copy_(part.roll(model.head_dim, 0))
    for part in _parts_of_qkv(atoms["layers.1.attention.query_key_value.bias"], model):
        part.copy_(part.roll(model.head_dim, 0))
    dense = atoms["layers.1.attention.dense.weight"]
    dense.copy_(dense.roll(model.head_dim, 1))


def _norms_exchanged(atoms, model):
    """As if the MLP saw attention's input."""
    one, other = atoms["layers.1.input_norm.bias"], atoms["layers.1.post_attention_norm.bias"]
    one.copy_(one.flip(0)), other.copy_(other.flip(0))


# -- the families -----------------------------------------------------------------------------------------------------


def _classes(family):
    def load():
        import transformers

        return getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}ForCausalLM")

    return load


def _llama_like(family, fault, **given):
    given = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, **given}
    return Family(_classes(family), given, _of_llama, fault)


_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
REFERENCES = {
    "LLaMA": _llama_like("Llama", _two_heads_exchanged),
    "LLaMA, tied": _llama_like("Llama", _gate_and_up_exchanged),
    "LLaMA 3": _llama_like(
        "Llama", _two_heads_exchanged,
        rope_parameters={"rope_theta": 500.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "Qwen3": _llama_like("Qwen3", _query_norm_left_out),
    # Mixtral's experts are as wide as its MLP would be.
    "Mixtral": _llama_like(
        "Mixtral", _two_experts_exchanged, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24
    ),
    "Qwen3-MoE": _llama_like("Qwen3Moe", _two_experts_exchanged, num_experts=4, norm_topk_prob=False, **_EXPERTS),
    "GLM-4.5": _llama_like(
        "Glm4Moe", _two_experts_exchanged, n_routed_experts=4, n_shared_experts=2, first_k_dense_replace=1,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5}, **_EXPERTS,
    ),
    "BLOOM": Family(_classes("Bloom"), {"layer_norm_epsilon": 1e-5}, _fused_by_head(_BLOOM), _first_head_last),
    "GPT-NeoX": Family(
        _classes("GPTNeoX"),
        {"layer_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh", "use_parallel_residual": True,
         "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.25}},
        _fused_by_head(_NEOX), _norms_exchanged,
    ),
}  # fmt: skip


def _huggingface(name, atoms, model, **changes):
    family = REFERENCES[name]
    config_class, model_class = family.reference()
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads, "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim, "intermediate_size": model.ffn_hidden_size, "n_head": model.num_attention_heads,
        "max_position_embeddings": 16, "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "attn_implementation": "eager",
    }  # fmt: skip
    if name == "BLOOM":  # n_layer and n_head are its own words
        shape = {key: value for key, value in shape.items() if key not in ("num_key_value_heads", "head_dim")}
        shape["n_layer"] = shape.pop("num_hidden_layers")
    if name == "GPT-NeoX":
        del shape["num_key_value_heads"], shape["head_dim"]
    reference = model_class(config_class(**{**shape, **family.given, **changes}))
    theirs = dict(reference.named_parameters())
    converted = family.convert(atoms, model)
    assert set(theirs) == set(converted)
    with torch.no_grad():
        for key, param in theirs.items():
            param.copy_(converted[key])
    return reference, theirs


# -- ours -------------------------------------------------------------------------------------------------------------


def _run(rank, world_size, topology, names):
    found = {}
    for name in names:
        model, _, _ = build(topology, config(**FAMILIES[name]), False)
        with torch.no_grad():
            # Biases and norms away from 0 and 1, or a mistake in them would not show; routers sure of their choice.
            for param_name, param in model.named_parameters():
                layout = param.atomic_layout
                if param.dim() == 1:
                    atom = torch.linspace(-0.3, 0.4, layout.numel) + (1.0 if "norm.weight" in param_name else 0.0)
                    param.copy_(layout.split(atom, param.shard_rank))
                elif "router" in param_name:
                    param.mul_(5.0)
        tokens, labels, mask = batch()
        model.eval()
        logits = model.logits(tokens).detach()
        model.train()
        loss = model(tokens, labels, mask)
        loss.backward()
        layouts = {key: param.atomic_layout for key, param in model.named_parameters()}
        grads = {key: param.grad for key, param in model.named_parameters()}
        weights = {key: param.detach() for key, param in model.named_parameters()}
        found[name] = logits, loss.detach(), weights, grads, layouts
    return found


def _check(name, topology, results):
    model = config(**FAMILIES[name])
    layouts = [result[4] for result in results]
    atoms = merged([result[2] for result in results], layouts, topology)
    reference, theirs = _huggingface(name, atoms, model)
    tokens, labels, mask = batch()
    expected = reference(tokens).logits
    nll = torch.nn.functional.cross_entropy(expected.transpose(1, 2), labels, reduction="none")
    loss = ((nll * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    for logits, our_loss, *_ in results:
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
        assert our_loss.item() == pytest.approx(loss.item(), abs=TOLERANCE)
    if topology.ep_size == 1:  # else experts have seen every rank's copy of the batch
        grads = REFERENCES[name].convert(merged([result[3] for result in results], layouts, topology), model)
        for key, param in theirs.items():
            torch.testing.assert_close(
                grads[key], param.grad, rtol=1e-4, atol=TOLERANCE, msg=lambda m, k=key: f"{k}: {m}"
            )
    broken_atoms = {key: atom.clone() for key, atom in atoms.items()}
    REFERENCES[name].fault(broken_atoms, model)
    broken, _ = _huggingface(name, broken_atoms, model)
    assert (broken(tokens).logits - expected).abs().max() > 50 * TOLERANCE
    if model.positions == "rope":
        changed = {**reference.config.rope_parameters, "rope_theta": 2 * model.rope_theta}
        turned, _ = _huggingface(name, atoms, model, rope_parameters=changed)
        assert (turned(tokens).logits - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("topology", "names"),
    [
        (Topology(), list(FAMILIES)),
        (Topology(tp_size=2), list(FAMILIES)),
        (Topology(tp_size=3), ["BLOOM"]),
        (Topology(tp_size=4), ["LLaMA 3", "Qwen3-MoE"]),  # of two key/value heads
        (Topology(dp_size=2, ep_size=2), ["Mixtral", "Qwen3-MoE", "GLM-4.5"]),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, Topology) else f"{len(value)} families",
)
def test_logits_loss_and_gradients(topology, names):
    results = run_ranks(topology.world_size, _run, topology, names)
    for name in names:
        _check(name, topology, [result[name] for result in results])


def test_every_family_has_a_reference():
    assert set(REFERENCES) == set(FAMILIES)
    assert len(FAMILIES) >= 9
