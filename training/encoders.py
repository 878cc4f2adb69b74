"""How a run's encoders compute: with less memory, or compiled. What they compute stays the same."""

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.errors import as_input_error


def set_up_encoders(model: VicRegForPreTraining, *, gradient_checkpointing: bool, torch_compile: bool) -> None:
    """Let the encoders compute their layers again on the way back, compile them, or both; in place.

    Names of weights stay those of encoders that are not compiled. Expander and loss are left alone: they work on the
    batch of all processes.

    Raises:
        InputError: An encoder cannot compute its layers again.
    """
    for encoder in model.encoders:
        if gradient_checkpointing:
            # renamed between the oldest transformers we take and the newest
            renamed = hasattr(encoder, "activation_checkpointing_enable")
            name = "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable"
            with as_input_error("gradient_checkpointing"):
                getattr(encoder, name)({"use_reentrant": False})
        if torch_compile:
            encoder.compile()
