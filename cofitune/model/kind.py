"""Which class of transformers a base is built by, and whether it is a causal language model at all."""

from __future__ import annotations

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from cofitune.errors import UserError

_NEEDS_IMAGE = "answers nothing without an image"
# what transformers builds as causal language models, with images or without, and what they do instead of answering a
# text with its next token
OTHERS = {
    "blip-2": _NEEDS_IMAGE,
    "cpmant": "reads its prompt in both directions",
    "diffusion_gemma": "answers with several tokens at once",
    "gemma4_assistant": "drafts tokens for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts tokens for another model, whose states it reads",
    "idefics": _NEEDS_IMAGE,
    "instructblip": _NEEDS_IMAGE,
    "instructblipvideo": _NEEDS_IMAGE,
    "kosmos-2": _NEEDS_IMAGE,
    "musicgen": "answers with codes of sound",
    "musicgen_melody": "answers with codes of sound",
    "paligemma": "reads its prompt in both directions",
    "pix2struct": _NEEDS_IMAGE,
    "prophetnet": "answers with several tokens at once",
    "t5gemma2": "reads its prompt in both directions",
    "udop": "reads its prompt in both directions",
    "vision-encoder-decoder": _NEEDS_IMAGE,
    "xlnet": "predicts tokens in an order of its own",
}

UNTRAINED = {  # causal language models that a batch of items does not fit
    "reformer": "trains only on sequences whose length is a multiple of its attention's chunks, which items are not",
}


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """The class that builds and loads a model of this config: of causal language models, or of those with images too.

    A model with images is taken whole, as its files hold it, and its text model trains. Some families have a class for
    the text model alone, too; which one the files are of, `architectures` in config.json says.
    """
    chosen: type[AutoModelForCausalLM | AutoModelForImageTextToText] = AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        saved_by = (config.architectures or [""])[0]
        whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or saved_by == whole:
            chosen = AutoModelForImageTextToText
    return chosen


def check_kind(config: PretrainedConfig) -> None:
    """Refuse a model type that transformers builds as a causal language model, and that is none or trains on no items.

    Raises:
        UserError: it is one of those.
    """
    if config.model_type in UNTRAINED:
        raise UserError(f"model.name: model type {config.model_type} {UNTRAINED[config.model_type]}")
    if config.model_type in OTHERS:
        what = OTHERS[config.model_type]
        raise UserError(f"model.name: model type {config.model_type} {what}: it is no causal language model")


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model that is no causal language model, though transformers builds it as one.

    Raises:
        UserError: its tokens see what lies behind them, or it answers something else than the next token.
    """
    kind = model.config.model_type
    is_encoder = getattr(model.config, "is_decoder", None) is False  # GPT-NeoX says so, too, and never looks at it
    if is_encoder and any(getattr(module, "is_decoder", None) is False for module in model.modules()):
        raise UserError(
            f"model.name: model type {kind} attends in both directions (is_decoder is false in its config.json): it "
            "is no causal language model"
        )
    if getattr(model.config, "causal", None) is False:
        raise UserError(
            f"model.name: model type {kind} attends in both directions (causal is false in its config.json): it is no "
            "causal language model"
        )
    if getattr(model.config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        raise UserError(
            f"model.name: model type {kind} attends in both directions (use_bidirectional_attention in its "
            "config.json): it is no causal language model"
        )
    if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        raise UserError(
            f"model.name: model type {kind} has no input embedding or no head: it is no causal language model"
        )
