"""The shape of the model: everything that decides what the atomic parameters are.

Two runs with equal ModelConfig have the same atomic parameters under every parallelism, so
this is what a checkpoint is compared with when it is resumed.

    model = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024)
    model.ffn_hidden_size, model.num_key_value_heads, model.head_dim     # 3072, 12, 64: derived if not given
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.config.flag import REQUIRED, flag
from megatron.config.presets import PRESETS, apply_preset
from megatron.ucp.naming.adapters import PROJECTIONS, default_projections

ROPE_SCALINGS = ("linear", "ntk", "llama3", "longrope")


@dataclass(frozen=True)
class ModelConfig:
    """A GPT. `None` in a size means derived; after construction no size but `vocab_size` is None.
    With `dataclasses.replace` give the derived sizes anew if what they derive from changes. `model_preset` is only the
    name of where values came from (`of_preset`): no part of what a checkpoint must agree on."""

    num_layers: int = flag(help="transformer blocks", unit="blocks")
    hidden_size: int = flag(help="width of the residual stream", unit="features")
    num_attention_heads: int = flag(help="query heads of one block", unit="heads")
    seq_length: int = flag(REQUIRED, "--seq-length", "--encoder-seq-length", help="tokens of one sample", unit="tokens")
    model_preset: str | None = flag(
        None,
        help="values of a published model, or of a tiny one (table below); a flag that is given too replaces its value",
        choices=tuple(PRESETS),
    )
    ffn_hidden_size: int | None = flag(
        None, help="width inside the MLP; default 4 x hidden (8/3 x hidden with SwiGLU)", unit="features"
    )
    num_key_value_heads: int | None = flag(
        None,
        help="key/value heads of one block (grouped-query attention); default: as many as query heads",
        unit="heads",
    )
    kv_channels: int | None = flag(None, help="features of one head; default: hidden / heads", unit="features")
    max_position_embeddings: int | None = flag(
        None, help="rows of the position table; default: the sequence length", unit="positions"
    )
    vocab_size: int | None = flag(
        None,
        help="true number of tokens; default: the tokenizer's. Of a NullTokenizer the number of its words N, to which "
        "the end-of-document id N is added",
        unit="tokens",
    )
    pad_vocab_size_to: int | None = flag(
        None,
        help="rows of the vocabulary, if it has fewer tokens: unlike padding for tensor parallelism they are part of "
        "the model, and in every checkpoint",
        unit="tokens",
    )
    make_vocab_size_divisible_by: int = flag(
        128, help="the vocabulary is padded to a multiple of this times the tensor parallel size", unit="rows"
    )
    normalization: str = flag("layernorm", help="kind of normalisation", choices=("layernorm", "rmsnorm"))
    layernorm_epsilon: float = flag(1e-5, "--layernorm-epsilon", "--norm-epsilon", help="added to the variance")
    qk_layernorm: bool = flag(False, help="normalise every query and key head (as Qwen3)")
    embed_layernorm: bool = flag(False, help="normalise the word embedding (as BLOOM)")
    use_parallel_residual: bool = flag(
        False, help="attention and MLP side by side, both on the block's input (as GPT-NeoX)"
    )
    swiglu: bool = flag(False, help="gated SiLU in the MLP")
    exact_gelu: bool = flag(False, help="the MLP's GELU by the error function (as Pythia's), not by tanh (as GPT-2's)")
    use_rotary_position_embeddings: bool = flag(False, help="rotary positions instead of a table")
    add_position_embedding: bool = flag(True, "--no-position-embedding", help="no learned position table", stores=False)
    position_embedding_type: str = flag(
        "learned_absolute", help="kind of positions", choices=("learned_absolute", "rope", "alibi")
    )
    rope_theta: float = flag(
        10000.0,
        "--rotary-position-embeddings-theta",
        "--rotary-base",
        "--rope-theta",
        help="base of the rotary frequencies",
    )
    rotary_percent: float = flag(1.0, help="part of each head that is rotated", unit="0..1")
    rope_scaling_type: str | None = flag(
        None,
        "--rope-scaling-type",
        help="stretch rotary positions: linear divides them, ntk raises the base, llama3 divides the low frequencies, "
        "longrope each by a factor of its own",
        choices=ROPE_SCALINGS,
        switches={"--use-rope-scaling": "llama3"},
    )
    rope_scaling_factor: float = flag(8.0, help="how many times the positions are stretched")
    rope_low_freq_factor: float = flag(1.0, help="llama3: a wave longer than the original length / this is stretched")
    rope_high_freq_factor: float = flag(4.0, help="llama3: a wave shorter than the original length / this is left")
    rope_original_max_position_embeddings: int = flag(
        8192, help="llama3, longrope: the length before stretching", unit="positions"
    )
    rope_short_factors: tuple[float, ...] = flag(
        (), help="longrope: what each frequency is divided by in sequences of up to the original length"
    )
    rope_long_factors: tuple[float, ...] = flag((), help="longrope: the same in longer sequences")
    rope_short_mscale: float = flag(
        1.0, help="longrope: what queries and keys are multiplied by in sequences of up to the original length"
    )
    rope_long_mscale: float = flag(1.0, help="longrope: the same in longer sequences")
    untie_embeddings_and_output_weights: bool = flag(
        False, help="a weight of its own for the output layer instead of the word embedding"
    )
    add_bias_linear: bool = flag(True, "--disable-bias-linear", help="no biases in linear layers", stores=False)
    add_qkv_bias: bool = flag(False, help="with --disable-bias-linear: biases of queries, keys and values all the same")
    add_attention_bias: bool = flag(
        False, help="with --disable-bias-linear: biases of all of attention's matrices all the same"
    )
    add_output_layer_bias: bool = flag(False, help="a bias of the (untied) output layer")
    lora_rank: int = flag(0, help="train low-rank adapters (LoRA) of this rank beside the matrices, and nothing else")
    lora_alpha: float | None = flag(None, help="what an adapter adds is times this / rank; default: the rank")
    lora_target_modules: tuple[str, ...] = flag(
        (), help="matrices that have adapters; default: all, of a mixture of experts attention's", choices=PROJECTIONS
    )
    lora_fused: bool = flag(
        False, help="one adapter for q, k, v together, and one for gate and up (as PEFT's of GPT-2, BLOOM, GPT-NeoX)"
    )
    hidden_dropout: float = flag(0.1, help="dropout on the residual stream", unit="probability")
    attention_dropout: float = flag(0.1, help="dropout on attention weights", unit="probability")
    init_method_std: float = flag(0.02, help="standard deviation of initial weights")
    num_experts: tuple[int, ...] = flag((1,), help="experts of an MLP (one number, or one per MoE layer)")
    topk: int = flag(1, "--topk", "--moe-router-topk", help="experts that a token is sent to")
    expert_interval: int = flag(2, help="every how many blocks there is an MoE layer", unit="blocks")
    moe_ffn_hidden_size: int | None = flag(None, help="width inside one expert; default: the MLP's", unit="features")
    moe_shared_expert_intermediate_size: int = flag(
        0, help="width of an MLP beside the experts that every token goes through; 0 is none", unit="features"
    )
    moe_router_score_function: str = flag(
        "softmax",
        help="from the router's logits to the experts' weights; sparsemixer: one expert after the other, in training "
        "by chance, each weighed against those that are as good but for --moe-sparsemixer-eps",
        choices=("softmax", "sigmoid", "sparsemixer"),
    )
    moe_sparsemixer_eps: float = flag(
        0.01, help="sparsemixer: experts count whose logit is below the best one's by at most twice this part of it"
    )
    moe_normalize_topk: bool = flag(
        True,
        "--no-moe-normalize-topk",
        help="the chosen experts' scores as they are, not divided by their sum (of one expert they never are)",
        stores=False,
    )
    moe_router_jitter: float = flag(
        0.0,
        "--moe-router-jitter",
        "--moe-input-jitter-eps",
        help="in training the router sees its input times a random 1 - this to 1 + this",
    )
    moe_aux_loss_coeff: float = flag(
        0.1,
        "--moe-loss-coeff",
        "--moe-aux-loss-coeff",
        help="of the load balancing loss of each MoE layer, which is 1 where experts are evenly used",
    )
    moe_z_loss_coeff: float = flag(0.0, help="of the mean square of the router's log sum exp")
    moe_train_capacity_factor: float | None = flag(
        None,
        "--moe-train-capacity-factor",
        "--moe-expert-capacity-factor",
        help="tokens of a sequence that an expert takes, in units of an even share; default: all that are sent to it",
    )
    moe_eval_capacity_factor: float | None = flag(None, help="the same in evaluation; default: as in training")
    moe_min_capacity: int = flag(4, help="least number of tokens of a sequence that an expert takes", unit="tokens")
    moe_token_dropping: bool = flag(
        True, "--disable-moe-token-dropping", help="no capacity, whatever the factors say", stores=False
    )
    recompute_granularity: str | None = flag(
        None,
        "--recompute-granularity",
        help="activation checkpointing: whole blocks, or attention only",
        choices=("full", "selective"),
        switches={"--checkpoint-activations": "full", "--recompute-activations": "selective"},
    )
    recompute_method: str | None = flag(
        None,
        "--recompute-method",
        "--checkpoint-method",
        help="with full: checkpoint groups of blocks uniformly, or the first blocks only",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = flag(
        1,
        "--recompute-num-layers",
        "--checkpoint-num-layers",
        help="blocks in a checkpointed group (uniform) or blocks checkpointed (block)",
        unit="blocks",
    )

    def __post_init__(self) -> None:
        if self.ffn_hidden_size is None:
            # Megatron's rule (megatron/arguments.py): with a gate, 2/3 as wide, to a multiple of 64.
            width = int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.swiglu else 4 * self.hidden_size
            object.__setattr__(self, "ffn_hidden_size", width)
        if self.kv_channels is None:
            object.__setattr__(self, "kv_channels", self.hidden_size // max(1, self.num_attention_heads))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.max_position_embeddings is None:
            object.__setattr__(self, "max_position_embeddings", self.seq_length)
        if self.moe_ffn_hidden_size is None:
            object.__setattr__(self, "moe_ffn_hidden_size", self.ffn_hidden_size)
        if self.lora_alpha is None and self.lora_rank:
            object.__setattr__(self, "lora_alpha", float(self.lora_rank))

    @classmethod
    def of_preset(cls, name: str, **values: Any) -> ModelConfig:
        """The preset, with `values` in place of what it states. Raises KeyError."""
        values["model_preset"] = name
        apply_preset(values)
        return cls(**values)

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.kv_channels

    @property
    def positions(self) -> str:
        """ "rope", "alibi", "learned_absolute" or "none"."""
        if self.use_rotary_position_embeddings:
            return "rope"
        if self.position_embedding_type == "learned_absolute" and not self.add_position_embedding:
            return "none"
        return self.position_embedding_type

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated, an even number."""
        return int(self.head_dim * self.rotary_percent) // 2 * 2

    @property
    def lora_projections(self) -> tuple[str, ...]:
        """Matrices that have adapters."""
        if not self.lora_rank:
            return ()
        chosen = self.lora_target_modules or default_projections(self.swiglu, self.has_experts)
        return tuple(name for name in PROJECTIONS if name in chosen)

    @property
    def has_qkv_bias(self) -> bool:
        return self.add_bias_linear or self.add_qkv_bias or self.add_attention_bias

    @property
    def has_attention_output_bias(self) -> bool:
        return self.add_bias_linear or self.add_attention_bias

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks whose MLP is experts: as upstream, the last of every `expert_interval` blocks
        (Megatron-DeepSpeed, megatron/model/transformer.py)."""
        if max(self.num_experts) <= 1 or self.expert_interval < 1:
            return ()
        return tuple(range(self.expert_interval - 1, self.num_layers, self.expert_interval))

    def num_experts_of(self, layer: int) -> int:
        """1 where block `layer` has an ordinary MLP."""
        layers = self.moe_layers
        if layer not in layers:
            return 1
        return self.num_experts[layers.index(layer)] if len(self.num_experts) > 1 else self.num_experts[0]

    @property
    def has_experts(self) -> bool:
        return any(self.num_experts_of(layer) > 1 for layer in self.moe_layers)

    def capacity_factor(self, is_training: bool) -> float | None:
        """None: an expert takes every token that is sent to it."""
        if not self.moe_token_dropping:
            return None
        if is_training or self.moe_eval_capacity_factor is None:
            return self.moe_train_capacity_factor
        return self.moe_eval_capacity_factor

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the word embedding over all shards: the true vocabulary padded so that every rank of
        `tp_size` has the same multiple of `make_vocab_size_divisible_by`. Padding exists only in shards."""
        if self.vocab_size is None:
            raise ValueError(
                "vocab_size is None. Expected: the tokenizer's size. "
                "What to do: dataclasses.replace(model, vocab_size=tokenizer.vocab_size)"
            )
        multiple = self.make_vocab_size_divisible_by * tp_size
        return -(-self.vocab_size // multiple) * multiple
