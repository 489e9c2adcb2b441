"""Eviction policies: each file decides which prompt entries are kept."""

from lookahead_jax.policies.ada import Ada
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.chunkkv import ChunkKV
from lookahead_jax.policies.critical import Critical
from lookahead_jax.policies.expected_attention import ExpectedAttention
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.h2o import H2O
from lookahead_jax.policies.incremental import Incremental
from lookahead_jax.policies.keydiff import KeyDiff
from lookahead_jax.policies.knorm import KNorm
from lookahead_jax.policies.kvzap import KVzap
from lookahead_jax.policies.kvzip import KVzip, KVzipPlus
from lookahead_jax.policies.lagkv import LagKV
from lookahead_jax.policies.laq import LAQ, LAQPlusPlus
from lookahead_jax.policies.layers import Layers
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.policies.oracle import Oracle
from lookahead_jax.policies.pyramidkv import PyramidKV
from lookahead_jax.policies.qfilter import QFilter
from lookahead_jax.policies.random import Random
from lookahead_jax.policies.registry import POLICIES, make_policy
from lookahead_jax.policies.rkv import RKV
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.speckv import SpecKV
from lookahead_jax.policies.streaming_llm import StreamingLLM
from lookahead_jax.policies.threshold import Threshold
from lookahead_jax.policies.tova import Tova
from lookahead_jax.policies.triattention import TriAttention
from lookahead_jax.policies.wrapper import PolicyWrapper

__all__ = [
    "H2O",
    "LAQ",
    "POLICIES",
    "RKV",
    "Ada",
    "ChunkKV",
    "Critical",
    "ExpectedAttention",
    "Full",
    "Incremental",
    "KNorm",
    "KVzap",
    "KVzip",
    "KVzipPlus",
    "KeyDiff",
    "LAQPlusPlus",
    "LagKV",
    "Layers",
    "LookaheadKV",
    "Oracle",
    "Policy",
    "PolicyWrapper",
    "PyramidKV",
    "QFilter",
    "Random",
    "SnapKV",
    "SpecKV",
    "StreamingLLM",
    "Threshold",
    "Tova",
    "TriAttention",
    "make_policy",
]
