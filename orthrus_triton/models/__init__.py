"""Dual-view models of transformers' families (`families.FAMILIES`): OrthrusForCausalLM and its configuration."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from orthrus_triton.models.config import OrthrusConfig
from orthrus_triton.models.modeling import OrthrusForCausalLM

if OrthrusConfig.model_type not in CONFIG_MAPPING:  # AutoConfig and AutoTokenizer then read what we save
    AutoConfig.register(OrthrusConfig.model_type, OrthrusConfig)
    AutoModelForCausalLM.register(OrthrusConfig, OrthrusForCausalLM)

__all__ = ["OrthrusConfig", "OrthrusForCausalLM"]
