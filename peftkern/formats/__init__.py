"""Files of the ecosystem: bitsandbytes' NF4 keys, PEFT's adapters (`peftkern.formats.adapter`), atomic saves."""

from peftkern.formats.atomic import atomic_save_safetensors, atomic_write_bytes, atomic_write_text, load_safetensors
from peftkern.formats.nf4 import nf4_from_state_dict, nf4_state_dict

__all__ = [
    "atomic_save_safetensors",
    "atomic_write_bytes",
    "atomic_write_text",
    "load_safetensors",
    "nf4_from_state_dict",
    "nf4_state_dict",
]
