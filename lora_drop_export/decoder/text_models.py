"""Causal language models of decoders for which transformers' AutoModelForCausalLM has none: text parts of multimodal
models."""

from __future__ import annotations

import importlib
from typing import Any

_NAMED = {"mistral4": "Mistral4ForCausalLM"}  # model type → class, which is there and not in its table


def _muse_glimmer(source: Any) -> type[Any]:
    """Of the text model, and of the head as `MuseGlimmerForConditionalGeneration` has it."""
    import torch
    from transformers import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class MuseGlimmerTextForCausalLM(source.MuseGlimmerPreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config_class = source.MuseGlimmerTextConfig
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = source.MuseGlimmerTextModel(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state)
            cap = self.config.final_logit_softcapping
            return CausalLMOutputWithPast(logits=torch.tanh(logits * self.config.output_multiplier / cap) * cap)

    return MuseGlimmerTextForCausalLM


_MADE = {"muse_glimmer_text": _muse_glimmer}


def register_text_model(config: Any) -> None:
    """Let AutoModelForCausalLM make the model of this config; nothing for most, which it knows."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    kind, module = config.model_type, type(config).__module__
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or not module.startswith("transformers.")  # code of its own
    if known or kind not in {*_NAMED, *_MADE}:
        return
    source = importlib.import_module(module.replace(".configuration_", ".modeling_"))
    made = _MADE[kind](source) if kind in _MADE else getattr(source, _NAMED[kind])
    # Without exist_ok it leaves out configs of transformers' own, lest the code of a checkpoint take their place
    AutoModelForCausalLM.register(type(config), made, exist_ok=True)
