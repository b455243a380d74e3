"""Makes the sample checkpoints in this folder with NVIDIA's megatron-core, on a CPU. See README.md beside it.

torchrun --nproc-per-node 2 make.py OUT --model llama --tp 2

Trains a tiny model for three steps, saves it as Megatron-LM's pretrain_gpt.py does, trains three steps more, and writes
all losses and gradient norms to OUT/losses.json.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

# What megatron-core asks of CUDA, answered by the CPU; before it is imported.
CPU = torch.device("cpu")
torch.cuda.current_device = lambda: CPU
torch.cuda.synchronize = lambda *args, **kwargs: None
torch.cuda.empty_cache = lambda: None
torch.Tensor.cuda = lambda self, *args, **kwargs: self
_type = torch.Tensor.type


def _type_as_on_cuda(self, *args, **kwargs):
    """The optimizers choose by the name."""
    found = _type(self, *args, **kwargs)
    return found if args or kwargs else found.replace("torch.", "torch.cuda.")


torch.Tensor.type = _type_as_on_cuda


def _on_cpu(made):
    return lambda *args, device=None, **kwargs: made(*args, device=None if device is None else CPU, **kwargs)


for _name in ("empty", "zeros", "ones", "tensor", "full", "arange", "empty_like", "zeros_like"):
    setattr(torch, _name, _on_cpu(getattr(torch, _name)))

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # 0.16.1 asks for it where Transformer Engine is missing

SEQ, BATCH, VOCAB, PADDED, STEPS, MORE = 8, 4, 29, 32, 3, 3
LR, MIN_LR, WARMUP, DECAY, WEIGHT_DECAY = 0.02, 0.002, 8, 64, 0.1
"""The schedule's lengths are in samples."""


def model_arguments(asked):
    llama = asked.model == "llama"
    return {
        "num_layers": asked.layers,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 24 if llama else 64,
        "num_query_groups": 2 if llama else 4,
        "group_query_attention": llama,
        "kv_channels": 4,
        "swiglu": llama,
        "normalization": "RMSNorm" if llama else "LayerNorm",
        "add_bias_linear": not llama,
        "add_qkv_bias": asked.qkv_bias,
        "qk_layernorm": asked.qk_layernorm,
        "untie_embeddings_and_output_weights": asked.untie,
        "position_embedding_type": "rope" if llama else "learned_absolute",
        "norm_epsilon": 1e-5,
        "vocab_size": VOCAB,
        "padded_vocab_size": PADDED,
        "max_position_embeddings": SEQ,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "num_experts": asked.experts or None,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.0,
        "moe_ffn_hidden_size": 24 if asked.experts else None,
    }


def build(asked, values):
    precision = torch.bfloat16 if asked.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=values["num_layers"],
        hidden_size=values["hidden_size"],
        num_attention_heads=values["num_attention_heads"],
        ffn_hidden_size=values["ffn_hidden_size"],
        num_query_groups=values["num_query_groups"],
        kv_channels=values["kv_channels"],
        normalization=values["normalization"],
        layernorm_epsilon=values["norm_epsilon"],
        add_bias_linear=values["add_bias_linear"],
        add_qkv_bias=values["add_qkv_bias"],
        gated_linear_unit=values["swiglu"],
        activation_func=F.silu
        if values["swiglu"]
        else partial(F.gelu, approximate="none" if asked.exact_gelu else "tanh"),
        init_method_std=0.5 if asked.exact_gelu else 0.02,  # by small weights it would not show which GELU it is
        qk_layernorm=values["qk_layernorm"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=asked.tp,
        pipeline_model_parallel_size=asked.pp,
        expert_model_parallel_size=asked.ep,
        pipeline_dtype=precision,
        params_dtype=precision,
        bf16=asked.bf16,
        hetereogenous_dist_checkpoint=asked.by_layer,
        overlap_p2p_comm=False,
        batch_p2p_comm=False,
        num_moe_experts=values["num_experts"],
        moe_ffn_hidden_size=values["moe_ffn_hidden_size"],
        moe_router_topk=values["moe_router_topk"],
        moe_token_dispatcher_type="allgather",
    )
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_layer_local_spec(
        normalization=values["normalization"],
        qk_layernorm=values["qk_layernorm"],
        num_experts=values["num_experts"],
        moe_grouped_gemm=False,
    )
    model = GPTModel(
        config,
        spec,
        PADDED,
        SEQ,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not asked.untie,
        position_embedding_type=values["position_embedding_type"],
    )
    with torch.no_grad():  # norms that are not all ones, biases that are not all zeros
        for name, param in model.named_parameters():
            if param.dim() == 1:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                param += 0.05 * torch.randn(param.shape, generator=generator).to(param.dtype)
    inner = model
    if asked.bf16:
        model = Float16Module(config, model)
    is_distributed = asked.optimizer != "plain"
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=is_distributed,
            overlap_grad_reduce=asked.bucket > 0,
            bucket_size=asked.bucket or None,
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LR,
            min_lr=MIN_LR,
            weight_decay=WEIGHT_DECAY,
            bf16=asked.bf16,
            params_dtype=precision,
            use_distributed_optimizer=is_distributed,
            clip_grad=1.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
        ),
        [model],
    )
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=LR, min_lr=MIN_LR, lr_warmup_steps=WARMUP, lr_decay_steps=DECAY,
        lr_decay_style="cosine", start_wd=WEIGHT_DECAY, end_wd=WEIGHT_DECAY, wd_incr_steps=DECAY,
        wd_incr_style="constant",
    )  # fmt: skip
    return config, inner, model, optimizer, schedule


def batch(step):
    return torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1000 + step % 2))


def train_step(config, model, optimizer, schedule, step):
    """(loss, gradient norm)."""
    dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = batch(step)[rank * BATCH // dp : (rank + 1) * BATCH // dp]
    positions = torch.arange(SEQ)[None].expand(len(rows), SEQ)
    mask = torch.ones(SEQ, SEQ).tril()[None, None] < 0.5

    def loss_of(losses):
        return losses.float().mean(), {"loss": losses.float().mean().detach()}

    def forward(_, net):
        return net(rows[:, :-1], positions, mask, labels=rows[:, 1:]), loss_of

    model.zero_grad_buffer()
    optimizer.zero_grad()
    found = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=SEQ,
        micro_batch_size=len(rows),
        forward_only=False,
    )
    _, norm, _ = optimizer.step()
    schedule.step(increment=BATCH)
    value = torch.stack([each["loss"] for each in found]).mean() if found else torch.zeros(())
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    values = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return float(values[-1] / dp), float(norm)


def save(folder, asked, values, model, optimizer, schedule):
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if asked.optimizer != "plain":
        metadata["distrib_optim_sharding_type"] = asked.optimizer
    args = argparse.Namespace(
        **values,
        tensor_model_parallel_size=asked.tp,
        pipeline_model_parallel_size=asked.pp,
        expert_model_parallel_size=asked.ep,
        expert_tensor_parallel_size=asked.tp,
        iteration=STEPS,
        consumed_train_samples=STEPS * BATCH,
        bias_gelu_fusion=not asked.exact_gelu,
        params_dtype=torch.bfloat16 if asked.bf16 else torch.float32,
        seq_length=SEQ,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        lr_warmup_init=0.0,
    )
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": STEPS,
        "content_metadata": metadata,
        "model": model.sharded_state_dict(metadata=metadata),
        "opt_param_scheduler": schedule.state_dict(),
    }
    more = {"metadata": metadata} if asked.optimizer != "plain" else {}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], **more)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=("gpt", "llama"), default="gpt")
    parser.add_argument("--optimizer", default="fully_reshardable", help="or dp_reshardable, or plain")
    for name, default in (("layers", 2), ("tp", 1), ("pp", 1), ("ep", 1), ("experts", 0), ("bucket", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("bf16", "untie", "qk-layernorm", "qkv-bias", "by-layer", "exact-gelu"):
        parser.add_argument(f"--{name}", action="store_true")
    asked = parser.parse_args()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(asked.tp, asked.pp, expert_model_parallel_size=asked.ep)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    values = model_arguments(asked)
    config, inner, model, optimizer, schedule = build(asked, values)
    before = [train_step(config, model, optimizer, schedule, step) for step in range(STEPS)]
    save(asked.out / f"iter_{STEPS:07d}", asked, values, inner, optimizer, schedule)
    after = [train_step(config, model, optimizer, schedule, step) for step in range(STEPS, STEPS + MORE)]
    if dist.get_rank() == 0:
        (asked.out / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
        (asked.out / "losses.json").write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n")


if __name__ == "__main__":  # the writer starts processes that import this file
    main()
