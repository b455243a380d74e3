"""The shape of the model: everything that decides what the atomic parameters are.

The one idea: two runs with equal ModelConfig have the same atomic parameters under every parallelism, so
this is what a checkpoint is compared with when it is resumed.

    model = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024)
    model.ffn_hidden_size, model.num_key_value_heads, model.head_dim     # 3072, 12, 64: derived if not given
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.flag import REQUIRED, flag


@dataclass(frozen=True)
class ModelConfig:
    """A GPT. `None` in a size means derived; after construction no size but `vocab_size` is None.
    With `dataclasses.replace` give the derived sizes anew if what they derive from changes."""

    num_layers: int = flag(help="transformer blocks", unit="blocks")
    hidden_size: int = flag(help="width of the residual stream", unit="features")
    num_attention_heads: int = flag(help="query heads of one block", unit="heads")
    seq_length: int = flag(REQUIRED, "--seq-length", "--encoder-seq-length", help="tokens of one sample", unit="tokens")
    ffn_hidden_size: int | None = flag(
        None, help="width inside the MLP; default 4 x hidden (8/3 x hidden with SwiGLU)", unit="features"
    )
    num_key_value_heads: int | None = flag(
        None, help="key/value heads of one block (grouped-query attention); default: as many as query heads",
        unit="heads",
    )  # fmt: skip
    kv_channels: int | None = flag(None, help="features of one head; only hidden / heads is built", unit="features")
    max_position_embeddings: int | None = flag(
        None, help="rows of the position table; default: the sequence length", unit="positions"
    )
    vocab_size: int | None = flag(
        None,
        help="true number of tokens; default: the tokenizer's (a NullTokenizer needs it here)",
        unit="tokens",
    )
    make_vocab_size_divisible_by: int = flag(
        128, help="the vocabulary is padded to a multiple of this times the tensor parallel size", unit="rows"
    )
    normalization: str = flag("layernorm", help="kind of normalisation", choices=("layernorm", "rmsnorm"))
    layernorm_epsilon: float = flag(1e-5, "--layernorm-epsilon", "--norm-epsilon", help="added to the variance")
    swiglu: bool = flag(False, help="gated SiLU in the MLP")
    use_rotary_position_embeddings: bool = flag(False, help="rotary positions instead of a table")
    add_position_embedding: bool = flag(True, "--no-position-embedding", help="no learned position table", stores=False)
    position_embedding_type: str = flag(
        "learned_absolute", help="kind of positions", choices=("learned_absolute", "rope", "alibi")
    )
    rope_theta: float = flag(
        10000.0, "--rotary-position-embeddings-theta", "--rotary-base", help="base of the rotary frequencies"
    )
    rotary_percent: float = flag(1.0, help="part of each head that is rotated", unit="0..1")
    untie_embeddings_and_output_weights: bool = flag(
        False, help="a weight of its own for the output layer instead of the word embedding"
    )
    add_bias_linear: bool = flag(True, "--disable-bias-linear", help="no biases in linear layers", stores=False)
    hidden_dropout: float = flag(0.1, help="dropout on the residual stream", unit="probability")
    attention_dropout: float = flag(0.1, help="dropout on attention weights", unit="probability")
    init_method_std: float = flag(0.02, help="standard deviation of initial weights")
    num_experts: tuple[int, ...] = flag((1,), help="experts of an MLP (one number, or one per MoE layer)")
    topk: int = flag(1, help="experts that a token is sent to")
    expert_interval: int = flag(2, help="every how many blocks there is an MoE layer", unit="blocks")
    recompute_granularity: str | None = flag(
        None,
        "--recompute-granularity",
        help="activation checkpointing: whole blocks, or attention only",
        choices=("full", "selective"),
        switches={
            "--checkpoint-activations": "full",
            "--recompute-activations": "selective",
        },
    )
    recompute_method: str | None = flag(
        None,
        "--recompute-method",
        "--checkpoint-method",
        help="with full: checkpoint groups of blocks uniformly, or the first blocks only",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = flag(
        1, "--recompute-num-layers", "--checkpoint-num-layers",
        help="blocks in a checkpointed group (uniform) or blocks checkpointed (block)", unit="blocks",
    )  # fmt: skip

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

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

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
