"""Loading the model and tokenizer from a directory or the hub, with errors a person can act on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from peftkern.training.errors import UserError, one_line

WEIGHTS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `--dtype` means on this device.

    "auto" is bfloat16 where the GPU has it, else float32. On CPUs float32 stays the default even where the CPU has
    bfloat16 instructions: it is the exact one, and on a CPU with AMX the shipped base trained only a fifth faster in
    bfloat16.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def default_device() -> torch.device:
    """The GPU this process would train on, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(model: str) -> Any:
    """The tokenizer of `model`. Raises UserError."""
    from transformers import AutoTokenizer

    check_source(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise UserError(f"cannot load a tokenizer from {model}: {_reason(error)}") from error


def load_model(model: str, dtype: torch.dtype) -> Any:
    """The causal language model of `model`, weights from safetensors only, on the CPU, in eval mode.

    Raises:
        UserError: no such directory or hub model, pickled or corrupt weights, not a causal language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    check_source(model)
    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True)
    except Exception as error:
        raise UserError(f"cannot load the model {model}: {_reason(error)}") from error
    return loaded.eval()


def check_source(model: str) -> None:
    """Raises UserError for a directory that cannot hold a loadable model. Hub names pass: only the hub knows them."""
    directory = Path(model)
    if not directory.is_dir():
        if directory.exists():
            raise UserError(f"model {model} is a file; give the directory that holds config.json")
        if model.startswith((".", "/", "~")) or model.count("/") > 1 or _is_local(directory):
            raise UserError(f"model directory {model} does not exist; give a directory with config.json or a hub name")
        return
    if not (directory / "config.json").is_file():
        adapter = (directory / "adapter_config.json").is_file()
        cure = "it is an adapter: give its base model" if adapter else "give the directory of a Transformers model"
        raise UserError(f"model directory {model} has no config.json; {cure}")
    weights = [path for pattern in WEIGHTS for path in directory.glob(pattern)]
    if not weights:
        pickles = [path.name for pattern in PICKLES for path in directory.glob(pattern)]
        if pickles:
            raise UserError(
                f"model directory {model} holds only pickled weights ({pickles[0]}), which can run code when loaded; "
                "convert them to safetensors in a place you trust"
            )
        raise UserError(f"model directory {model} has no .safetensors weights; download or copy it completely")
    for path in weights:
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Raises UserError when the file's header and length do not fit each other."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt or cut short ({one_line(error)}); copy or download it again") from None


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of a freshly loaded model."""
    return sum(p.numel() for p in model.parameters())


def context_length(model: str) -> int | None:
    """Positions the model was made for, if its config says so. Raises UserError when the config cannot be read."""
    from transformers import AutoConfig

    check_source(model)
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:
        raise UserError(f"cannot load the config of {model}: {_reason(error)}") from error
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) else None


def check_tokenizer_fits(model: Any, tokenizer: Any, source: str) -> None:
    """Raises UserError when the tokenizer can produce ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens but the model embeds only {rows}; "
            "use the tokenizer that belongs to the model"
        )


def read_json(path: Path) -> Any:
    """A JSON file, or None when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_local(directory: Path) -> bool:
    """Whether the path's parent exists here, so that a directory was meant and not a hub name."""
    return directory.parent.is_dir() and directory.parent != Path(".")


def _reason(error: BaseException) -> str:
    """The first sentence of a library's error: the rest is advice for programmers."""
    text = one_line(error)
    return text if len(text) <= 300 else text[:300].rsplit(" ", 1)[0] + " ..."
