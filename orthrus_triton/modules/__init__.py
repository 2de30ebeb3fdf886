"""Composable modules: attention with two views, a decoder layer, the shared KV cache and the decoder that runs them."""

from orthrus_triton.modules.attention import DualViewAttention
from orthrus_triton.modules.consensus_decoder import ConsensusDecoder
from orthrus_triton.modules.decode_run import DecodeRun
from orthrus_triton.modules.decode_stats import DecodeOutput, DecodeStats, first_difference
from orthrus_triton.modules.decoder_layer import OrthrusDecoderLayer, run_layers
from orthrus_triton.modules.dual_view_model import DualViewModel
from orthrus_triton.modules.kv_cache import CacheLayer, SharedKVCache, ViewPass
from orthrus_triton.modules.projection import FusedLinear, Linear
from orthrus_triton.modules.rms_norm import RMSNorm
from orthrus_triton.modules.rotary import RotaryEmbedding, RotarySets
from orthrus_triton.modules.run_to_end import NonFiniteLogitsError
from orthrus_triton.modules.sampling_params import Choosing, SamplingParams

__all__ = [
    "CacheLayer",
    "Choosing",
    "ConsensusDecoder",
    "DecodeOutput",
    "DecodeRun",
    "DecodeStats",
    "DualViewAttention",
    "DualViewModel",
    "FusedLinear",
    "Linear",
    "NonFiniteLogitsError",
    "OrthrusDecoderLayer",
    "RMSNorm",
    "RotaryEmbedding",
    "RotarySets",
    "SamplingParams",
    "SharedKVCache",
    "ViewPass",
    "first_difference",
    "run_layers",
]
