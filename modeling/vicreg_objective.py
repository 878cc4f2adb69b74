"""VICReg as a method of pretraining; its settings are the configuration's own."""

from .objective import Objective, Terms
from .vicreg_loss import vicreg_loss


class VicReg(Objective):
    """Invariance, variance and covariance; see `vicreg_loss.py`."""

    name = "vicreg"
    sees_shifts = False

    def __init__(self, config, encoder, expander):
        super().__init__(config, encoder, expander)
        self.weights = {
            name: getattr(config, name)
            for name in (
                "invariance_weight",
                "variance_weight",
                "covariance_weight",
                "gamma",
                "eps",
                "convention",
            )
        }

    def forward(self, embeddings, further, process_group):
        terms = vicreg_loss(
            *embeddings[:2],
            local_views=embeddings[2:],
            process_group=process_group,
            equal_shares=self.shares_are_equal,
            **self.weights,
        )._asdict()
        return Terms(terms.pop("loss"), terms)


__all__ = ["VicReg"]
