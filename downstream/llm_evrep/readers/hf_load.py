"""Loading an image-text-to-text model of transformers: from a folder or the Hub, safetensors only, strictly."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch

from downstream.llm_evrep.readers.base import fingerprint, short_path
from downstream.llm_evrep.readers.hf import HFReader

_DTYPES = ("float32", "bfloat16", "float16")


def build(
    name: str,
    *,
    device: torch.device | str = "cpu",
    max_new_tokens: int = 64,
    quantise: Literal["", "8bit", "4bit"] = "",
    dtype: str = "",
    batch_size: int = 16,
) -> HFReader:
    """A reader by the id of a model on the Hub, or a folder with its files.

    No code of a model's repository is run, and no pickle is read.

    Args:
        name: folder, or "<user>/<model>".
        device: where it runs.
        quantise: weights in 8 or 4 bits by bitsandbytes, on a GPU.
        dtype: of the weights: float32, bfloat16, float16; "" = as saved.
        max_new_tokens, batch_size: see HFReader.
    Raises:
        ModuleNotFoundError: transformers or bitsandbytes is not installed.
        FileNotFoundError: the model is neither a folder nor to be had from the Hub.
        ValueError: it is damaged, of another kind, or the settings do not fit.
    """
    if dtype and dtype not in _DTYPES:
        raise ValueError(f"llm.dtype={dtype!r}: choose one of {', '.join(_DTYPES)}, or nothing for the model's own")
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and (len(Path(name).parts) > 2 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"reader hf:{name}: no such folder; {_WAYS}")
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise ModuleNotFoundError(f"reader hf:{name} needs transformers: pip install -e '.[llm]'") from error
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype else "auto", "use_safetensors": True}
    if quantise:
        options |= {"quantization_config": _quantisation(quantise, dtype), "device_map": {"": device}}
    source = str(folder) if local else name
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True, **options
        )
        model, report = loaded  # two by output_loading_info
    except OSError as error:  # the Hub's and the network's errors, and files that are missing
        raise FileNotFoundError(f"reader hf:{name} cannot be loaded ({_short(error)}); {_WAYS}") from error
    except Exception as error:  # a damaged file, another architecture, code that would have to be trusted
        raise ValueError(
            f"reader hf:{name} is no image-text-to-text model that transformers reads ({_short(error)})"
        ) from error
    if faults := {key: list(report[key])[:5] for key in ("missing_keys", "mismatched_keys") if report.get(key)}:
        raise ValueError(f"reader hf:{name}: weights that do not fit the model: {faults}; download or save it again")
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ValueError(f"reader hf:{name}: its processor has no tokenizer or no image processor; {_WAYS}")
    if not quantise:
        model = model.to(device)
    label = f"hf:{name}"
    if local:
        files = [file for kind in ("safetensors", "json", "jinja", "model", "txt") for file in folder.glob(f"*.{kind}")]
        label = f"hf:{short_path(folder)}@{fingerprint(files)}"
    elif commit := getattr(model.config, "_commit_hash", None):
        label += f"@{commit[:12]}"
    label += f" quantise={quantise}" * bool(quantise) + f" dtype={dtype}" * bool(dtype)
    return HFReader(model, processor, name=label, max_new_tokens=max_new_tokens, batch_size=batch_size)


_WAYS = (
    "pass llm.name=hf:<folder with config.json, model*.safetensors, tokenizer and processor files>, or a "
    "Hub id where the Hub can be reached"
)


def _quantisation(quantise: str, dtype: str) -> Any:
    if quantise not in ("8bit", "4bit"):
        raise ValueError(f"llm.quantise={quantise!r}: choose 8bit, 4bit or nothing")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(f"llm.quantise={quantise} needs bitsandbytes: pip install bitsandbytes")
    if not torch.cuda.is_available():
        raise ValueError(f"llm.quantise={quantise} needs a GPU: leave it out, or run where there is one")
    from transformers import BitsAndBytesConfig

    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = getattr(torch, dtype) if dtype else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
