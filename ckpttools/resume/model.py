"""The tensors of a model by name, from any file that holds them, or from the configuration of one."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from msgspec import Struct, field

from ckpttools.checkpoint import Checkpoint
from ckpttools.containers import jsons
from ckpttools.errors import CkptError, Unsupported
from ckpttools.formats import locate, read
from ckpttools.location import Location
from ckpttools.stores.files import is_file, is_folder

Shape = tuple[int, ...]


class Tensor(Struct, frozen=True, kw_only=True):
    shape: Shape
    dtype: str  # short: "bf16"

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}".lstrip()


class Model(Struct, frozen=True, kw_only=True):
    """The new run's model. `shared` maps an alias to its owner.

    `dtypes_known` is False where a configuration alone was read; `where` is the path that it came from.
    """

    tensors: Mapping[str, Tensor]
    shared: Mapping[str, str] = field(default_factory=dict)
    ties: bool | None = None  # config.json's tie_word_embeddings
    dtypes_known: bool = True
    where: str = ""
    prefix: str = ""  # that DDP or torch.compile put before every name, and that was removed


def read_model(path: Location) -> Model:
    """The model of a folder or file. Raises CkptError where nothing in it tells names and shapes."""
    config = path / "config.json" if is_folder(path) else None
    settings = jsons.read(config) if config is not None and is_file(config) else None
    try:
        found = read(locate(path))
    except CkptError as error:
        if settings is None or error.id not in ("no-weights", "not-a-checkpoint"):
            raise
        return of_config(settings, path)
    ties = settings.get("tie_word_embeddings") if settings is not None else None
    return Model(
        tensors=tensors_of(found),
        shared=found.shared,
        ties=ties if isinstance(ties, bool) else None,
        where=str(path),
        prefix=prefix_of(found),
    )


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: Tensor(shape=ref.shape, dtype=ref.dtype.short) for name, ref in checkpoint.tensors.items()}


def prefix_of(checkpoint: Checkpoint) -> str:
    """What stands before every name in a single file: `module.` of DDP, `_orig_mod.` of torch.compile."""
    return checkpoint.layout.prefix


def of_config(settings: Mapping[str, object], where: Location) -> Model:
    """The shapes of a transformers model from its config.json: the Llama and GPT-2 families."""
    kind = settings.get("model_type")
    shapes = {"llama": _llama, "mistral": _llama, "gpt2": _gpt2}.get(str(kind))
    if shapes is None:
        raise Unsupported(
            "model-config",
            f"the shapes of a model of type {kind!r} are not known from its configuration alone",
            where=where,
            why="a config.json names layers and sizes, not tensors; only Llama's and GPT-2's are known here",
            hint="name a folder or file with the model's weights, of any save of the same model",
        )
    tied = settings.get("tie_word_embeddings", kind == "gpt2") is True
    found = shapes(settings, where)
    owner = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    return Model(
        tensors={name: Tensor(shape=shape, dtype="") for name, shape in found.items()},
        shared={"lm_head.weight": owner} if tied else {},
        ties=tied,
        dtypes_known=False,
        where=str(where),
    )


def _size(settings: Mapping[str, object], key: str, where: Location, default: object = None) -> int:
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise jsons.damaged(where, f"{key} is {value!r} where a size is expected")
    return value


def _llama(settings: Mapping[str, object], where: Location) -> dict[str, Shape]:
    hidden, vocab = _size(settings, "hidden_size", where), _size(settings, "vocab_size", where)
    inner, layers = _size(settings, "intermediate_size", where), _size(settings, "num_hidden_layers", where)
    heads = _size(settings, "num_attention_heads", where)
    key_heads = _size(settings, "num_key_value_heads", where, heads)
    head = _size(settings, "head_dim", where, hidden // heads)
    out: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        attention = {"q": heads, "k": key_heads, "v": key_heads}
        for name, n in attention.items():
            out[f"{at}self_attn.{name}_proj.weight"] = (n * head, hidden)
            if settings.get("attention_bias") is True:
                out[f"{at}self_attn.{name}_proj.bias"] = (n * head,)
        out[f"{at}self_attn.o_proj.weight"] = (hidden, heads * head)
        if settings.get("attention_bias") is True:
            out[f"{at}self_attn.o_proj.bias"] = (hidden,)
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            out[f"{at}mlp.{name}_proj.weight"] = shape
            if settings.get("mlp_bias") is True:
                out[f"{at}mlp.{name}_proj.bias"] = shape[:1]
        out[f"{at}input_layernorm.weight"] = out[f"{at}post_attention_layernorm.weight"] = (hidden,)
    out["model.norm.weight"] = (hidden,)
    out["lm_head.weight"] = (vocab, hidden)
    return out


def _gpt2(settings: Mapping[str, object], where: Location) -> dict[str, Shape]:
    hidden, vocab = _size(settings, "n_embd", where), _size(settings, "vocab_size", where)
    layers, positions = _size(settings, "n_layer", where), _size(settings, "n_positions", where)
    inner = _size(settings, "n_inner", where, 4 * hidden)
    out: dict[str, Shape] = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (positions, hidden),
    }
    for i in range(layers):
        at = f"transformer.h.{i}."
        for name, shape in {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, inner),
            "mlp.c_proj": (inner, hidden),
        }.items():
            out[f"{at}{name}.weight"], out[f"{at}{name}.bias"] = shape, shape[1:]
        for name in ("ln_1", "ln_2"):
            out[f"{at}{name}.weight"] = out[f"{at}{name}.bias"] = (hidden,)
    out["transformer.ln_f.weight"] = out["transformer.ln_f.bias"] = (hidden,)
    out["lm_head.weight"] = (vocab, hidden)
    return out


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
