"""Which models tell the conversations of a pack apart, and under which attention kernel."""

from __future__ import annotations

from transformers import PretrainedConfig

# Model types of transformers of which a pack gives at each token what its conversation gives alone, found by trying
# all of them (tests/model/test_packing.py). A model's class does not say: some make their masks without the positions,
# some carry a state from token to token. What is in neither list leaks, or was not tried.
_BOTH = """
    apertus arcee aria_text axk1 beam bitnet cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm dbrx
    deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint fuyu gemma
    gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe
    glm4_moe_lite got_ocr2 gpt2 gpt_bigcode gpt_neox granite granite_swa granitemoe granitemoe_swa granitemoeshared
    helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1
    laguna llama longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3
    mistral mixtral mllama modernbert-decoder moshi moss_transcribe_diarize nanochat nemotron olmo olmo2 olmo3 olmoe
    persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2
    vaultgemma youtu
"""
_MASKS = """
    axk2 deepseek_v32 doge dots3_note dots3_note_text glm_moe_dsa hy_v4 llama4 llama4_text
"""
_FLASH = "afmoe bert bert-generation electra ernie gpt_oss opt roc_bert"
APART_BY_MASK = frozenset(f"{_BOTH} {_MASKS}".split())  # eager, sdpa, flex_attention: the mask is made from positions
APART_BY_FLASH = frozenset(f"{_BOTH} {_FLASH}".split())  # FlashAttention is told where conversations begin
# these have a way of their own to attend, or cap what they attend by, which attention by conversation does not know
_NOT_VARLEN = """
    doge flint gemma2 got_ocr2 granite_swa granitemoe_swa hy_v4 llama4 llama4_text mimo_v2_flash nemotron phimoe
    qwen2_moe vaultgemma
"""
APART_BY_VARLEN = APART_BY_MASK - frozenset(_NOT_VARLEN.split())  # cofitune/model/varlen.py, in the mask's place


def refuses_packing(config: PretrainedConfig, flash: bool, trust_remote_code: bool = False) -> str | None:
    """Why the conversations of a pack would see each other; None where they do not.

    Args:
        flash: whether the attention kernel is FlashAttention.
        trust_remote_code: whether the model's code is its own, which may do anything.
    """
    kind = config.model_type
    if trust_remote_code:
        return "with model.trust_remote_code the model's layers are code that we do not know"
    if kind in (APART_BY_FLASH if flash else APART_BY_MASK):
        return None
    if kind in APART_BY_MASK:
        return f"under FlashAttention model type {kind} lets them see each other (under sdpa and eager it does not)"
    if kind in APART_BY_FLASH:
        return f"model type {kind} lets them see each other, except under model.attn_implementation: flash_attention_2"
    return f"model type {kind} is not known to keep them apart"
