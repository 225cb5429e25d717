"""GrootL, the language half of GrootVL / MambaTree (arXiv 2406.02395): the tree scan inside a pretrained Mamba.

Importing this package registers the model in the Auto classes of transformers:

    import grootl
    model = grootl.GrootLForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")

GrootL has Mamba's parameters under Mamba's names, and no others.
"""

from importlib.util import find_spec

if find_spec("grootvl_ops") is None or find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "grootl needs the packages grootvl_ops and transformers. Run in the folder of its source code: "
        "pip install ./ops '.[language]'"
    )

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_grootl import GrootLConfig
from .modeling_grootl import GrootLForCausalLM, GrootLModel

__all__ = ["GrootLConfig", "GrootLForCausalLM", "GrootLModel"]

AutoConfig.register(GrootLConfig.model_type, GrootLConfig)
AutoModel.register(GrootLConfig, GrootLModel)
AutoModelForCausalLM.register(GrootLConfig, GrootLForCausalLM)
