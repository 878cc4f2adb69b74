"""Why a test of upstream does not run here: what this suite leaves out, and what upstream itself does.

`README.md` has the same tables, and a run in which a test is skipped for a reason that is not in them fails.
"""

NO_VOCABULARY = "images have no vocabulary, so there is no table of tokens to resize"
NO_STATES = "VICReg returns states view by view, not layer by layer; the encoder's cases run this test"

# Names of tests, or their beginnings where upstream runs one test with several parameters, and the reason given.
ENCODER = {"test_resize_tokens_embeddings": NO_VOCABULARY}
VICREG = {
    "test_resize_tokens_embeddings": NO_VOCABULARY,
    "test_attention_outputs": NO_STATES,
    "test_eager_matches_sdpa_inference": NO_STATES,
    "test_hidden_states_output": NO_STATES,
    "test_retain_grad_hidden_states_attentions": NO_STATES,
}
MAE = {"test_resize_tokens_embeddings": NO_VOCABULARY}
ALL = {"encoder": ENCODER, "MAE": MAE, "VICReg": VICREG}

# What upstream says when it skips a test by itself, and why that is right for these models.
UPSTREAM = {
    "test requires": "no test here needs a GPU, nor deepspeed, flash attention, kernels or MPS",
    "test is slow": "needs a GPU as well, or loads a processor in a process that imports transformers alone",
    "Model does not support output_attentions": (
        "a row of a table of parameters that asks sdpa for probabilities; here `eager` gives them"
    ),
    "Model does not have position embeddings": "resizes a table of 1-D positions by a method text models have",
    "Model does not support sliding window mask": "a mask of causal text models",
    "does not support grouped_mm": "a kernel for experts",
    "This model has no sparse experts": "there are none",
    "This model has no `output_router_logits`": "of experts",
    "This model doesn't use `inputs_embeds`": "images go in",
    "This model does not have RoPE": "means 1-D RoPE in transformers' own class",
    "This model does not support RoPE scaling": "of 1-D RoPE in transformers' own class",
    "has no axial RoPE layer": "looks for a module; here rotary tables are a function, with tests of its own",
    "Model does not have a TP plan": "there is none",
    "No sequence-to-sequence language modeling head": "of text models",
    "No decoder-only language modeling head": "of text models",
    "No subconfigs": "the encoder's configuration has no part; VICReg's runs it",
    "Model is not a composite model": "the encoder is not; VICReg runs it",
    "This model is not composite": "the encoder is not; VICReg runs it",
    "BigBirdViTModel does not support SDPA": "upstream's words for a test of composite models; VICReg runs it",
    "VicRegForPreTraining does not support SDPA": "upstream's words for a test of other than composite models",
    "BigBirdViTForMaskedImageModeling does not support SDPA": "as of `BigBirdViTModel`",
    "BigBirdViTMAEForPreTraining does not support SDPA": "upstream's words for a test of other than composite models",
    "Model does not have both a non-text modality": "of models of images and text",
    "This model has no `base_model_class`": "in tests of RoPE in transformers' own classes",
    "VicRegConfig not in MODEL_MAPPING": "nor should it be: VICReg is a method, and the encoder is the model",
    "BigBirdViTMAEConfig not in MODEL_MAPPING": "nor should it be: MAE is a method, and the encoder is the model",
    "keep_in_fp32_modules": "no part of these models has to stay in full precision",
    "Do not take a cache as input": "caches are of models that write text",
    "No conversion found for": "no weights are renamed on loading",
    "No validation found for `preprocess`": "of two older forms; `preprocess` is inherited from transformers",
    "Not a prioritized model": "transformers before 5.18 or later looks at its own models alone; later ones run it",
}


class OwnSkips:
    """A mixin, first in the bases of a test case, that skips the tests named in `own_skips`."""

    own_skips: dict[str, str] = {}  # noqa: RUF012  replaced, never changed

    def setUp(self):
        for name, reason in self.own_skips.items():
            if self._testMethodName.startswith(name):
                self.skipTest(f"own skip: {reason}")
        super().setUp()
