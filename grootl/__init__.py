"""GrootL, the language half of GrootVL / MambaTree (arXiv 2406.02395): the tree scan inside a pretrained Mamba.

Importing this package registers the model in the Auto classes of transformers:

    import grootl
    model = grootl.GrootLForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")

GrootL has Mamba's parameters under Mamba's names, and no others.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_grootl import GrootLConfig
from .modeling_grootl import GrootLForCausalLM, GrootLModel

__all__ = ["GrootLConfig", "GrootLForCausalLM", "GrootLModel"]

AutoConfig.register(GrootLConfig.model_type, GrootLConfig)
AutoModel.register(GrootLConfig, GrootLModel)
AutoModelForCausalLM.register(GrootLConfig, GrootLForCausalLM)
