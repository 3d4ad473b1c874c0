"""Late quantisation-aware training: from some step on, weights pass through the exported grid."""

import torch

from pgolf.config import Config
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.model.matrices import Matrix
from pgolf.quant.clip_search import clip_factors
from pgolf.quant.plan import TensorPlan, plan_tensors


class LateQat:
    """The exported grid on every integer block matrix, behind one switch on the device.

    Args:
        model: on its device; without late QAT it is left alone.

    Attributes:
        on: what the switch says, for the host, which would have to wait to read it.

    Raises:
        ConfigError: the settings of the quantiser do not fit the model, with late QAT or without.
    """

    def __init__(self, model: GPT, config: Config, device: torch.device):
        self.switch = torch.zeros((), device=device)
        self.on = False
        self.plans: dict[Matrix, TensorPlan] = {}
        # Made even without QAT, so that settings which do not fit fail now, not after training.
        named = {name: tuple(p.shape) for name, p in model.named_parameters()}
        plans = plan_tensors(config.quant, named)
        steps = any(plan.clip == "uniform" for plan in plans.values())
        if config.artifact.fit_to_budget and not steps:
            raise ConfigError(
                "fit_to_budget=true: every matrix is stored as fp16, none has a step to choose: "
                "lower small_numel, or give them bits"
            )
        if config.quant.qat_start >= 1.0:
            return
        mask, impl = config.quant.qat_clip_mask, model.ops["fake_quant"]
        bits: dict[int, torch.Tensor] = {}  # one for all matrices that have as many
        for name, module in model.blocks.named_modules(prefix="blocks"):
            plan = plans.get(f"{name}.weight")
            if isinstance(module, Matrix) and plan is not None and plan.kind == "int":
                grid = plan.grid()
                own = bits.setdefault(plan.bits, torch.tensor(float(plan.bits), device=device))
                module.prepare_qat(own, self.switch, **grid, clip_mask=mask, impl=impl)
                self.plans[module] = plan

    def turn_on(self) -> None:
        """Fit the grids to the weights as they are, and use them from now on."""
        for matrix, plan in self.plans.items():
            matrix.qat_clip.copy_(clip_factors(matrix.weight.detach().float(), plan))
        self.switch.fill_(1.0)
        self.on = True

    def turn_off(self) -> None:
        self.switch.zero_()
        self.on = False

    def loaded(self) -> None:
        """The model's state, of which the switch is a part, is another one now."""
        self.on = bool(self.switch)
