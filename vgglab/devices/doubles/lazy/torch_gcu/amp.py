"""The double of ``torch_gcu.amp``. ``autocast`` does not change results here; only the order of calls is checked."""

import torch

from torch_gcu.core.contract import log
from torch_gcu.core.model import allow_step
from torch_gcu.core.tensor import Plain, to_card

scalers = []


class autocast:
    def __init__(self, enabled=True, dtype=torch.float16, cache_enabled=True):
        if dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"autocast does not support {dtype}")
        self.dtype = dtype

    def __enter__(self):
        log.call("autocast", dtype=str(self.dtype))

    def __exit__(self, *_):
        pass


class GradScaler:
    def __init__(
        self,
        init_scale=65536.0,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=2000,
        enabled=True,
        use_zero_grad=False,
    ):
        self._init_scale, self._growth_factor, self._backoff_factor = init_scale, growth_factor, backoff_factor
        self._growth_interval, self._use_zero_grad = growth_interval, use_zero_grad
        self._scale = self._growth_tracker = None
        self._has_overflowed = False
        scalers.append(self)

    def scale(self, loss):
        assert loss.device.type == "xla", f"the loss is on {loss.device}"
        if self._scale is None:
            self._scale = to_card(torch.tensor(float(self._init_scale)), 0)
            self._growth_tracker = to_card(torch.tensor(0), 0)
        log.record_step_call("scale")
        log.scaled_loss = loss
        return loss * self._scale

    def step(self, optimizer):
        if not self._use_zero_grad:
            raise TypeError("unlazy() got an unexpected keyword argument")  # the error of the vendor's release
        log.record_step_call("scaler.step")
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        with Plain():
            gradients = [gradient for gradient in gradients if gradient is not None]
            self._has_overflowed = not all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
            for gradient in gradients:
                gradient.zero_() if self._has_overflowed else gradient.div_(self._scale)
        with allow_step():
            return optimizer.step()  # on overflow, too: momentum and weight decay still apply

    def update(self):
        log.record_step_call("scaler.update", has_overflowed=self._has_overflowed)
        with Plain():
            if self._has_overflowed:
                self._scale.mul_(self._backoff_factor)
                self._growth_tracker.zero_()
            else:
                self._growth_tracker.add_(1)
                if int(self._growth_tracker) == self._growth_interval:
                    self._scale.mul_(self._growth_factor)
                    self._growth_tracker.zero_()

    def state_dict(self):
        with Plain():
            return {
                "scale": self._init_scale if self._scale is None else float(self._scale),
                "growth_factor": self._growth_factor,
                "backoff_factor": self._backoff_factor,
                "growth_interval": self._growth_interval,
                "_growth_tracker": 0 if self._growth_tracker is None else int(self._growth_tracker),
            }
