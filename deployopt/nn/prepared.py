"""A network with observers and fake-quantisers, to calibrate (PTQ) or to train (QAT): torchao's PT2E flow up to its prepared graph.

torchao rewrites convolution + BatchNorm so that the *folded* weight is fake-quantised while BatchNorm still learns (Krishnamoorthi,
https://arxiv.org/abs/1806.08342, section 3.2). Its `convert_pt2e` is not used: the result of quantisation is data, the scales by layer
name, and `nn.quantizer` builds the deployed graph from them. It would also take long whatever the network: 99 % of its time for a ResNet-18 (some 18 s)
went, with torchao 0.18, into tracing 96 small patterns of convolution and BatchNorm by Dynamo, to find those it had written.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from deployopt.errors import StageFailed
from deployopt.nn import parametrizations
from deployopt.nn.capture import capture, example_input
from deployopt.nn.placement import ADDS, BATCH_NORM, Layer, aten, layers, parameter_owner
from deployopt.nn.quantizer import ACTIVATION_MAX, ACTIVATION_MIN


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Without what torchao's own imports set off: deprecations, and torch's log line on each Enum that torchao registers as a pytree constant."""

    def keep(record: logging.LogRecord) -> bool:
        return "register_constant() on Enum" not in record.getMessage()

    logger = logging.getLogger("torch.utils._pytree")
    logger.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.removeFilter(keep)


with _quiet_import():
    from torchao.quantization.pt2e import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

if TYPE_CHECKING:
    from deployopt.nn.models import Network

ObserverName = Literal["moving_average", "min_max", "mse"]
SMALLEST_SCALE = 2**-24  # of an all-zero tensor, so that fake-quantisation never divides by zero
AVERAGING = 0.1  # of a batch in the moving average: a range follows within some ten batches, which is all a short calibration has
GOLDEN_RATIO = 0.6180339887498949
DROPOUTS = (aten.dropout, aten.dropout_, aten.feature_dropout, aten.feature_dropout_, aten.alpha_dropout, aten.feature_alpha_dropout)
TRAINING_ARGUMENT = {BATCH_NORM: 5, **{dropout.default: 2 for dropout in DROPOUTS}}
MOMENTUM_ARGUMENT, EPS_ARGUMENT = 6, 7


@dataclass(frozen=True)
class Scheme:
    """How ranges are found.

    Attributes:
        observer: of activations. "moving_average" of batches' minimum and maximum, "min_max" over all batches,
            "mse": moving average of the clipping range with the least squared rounding error.
        saturation_guard: limit weights whose input may be negative to ±63 (`Layer.weight_limit`).
        float_layers: kept in float, by module path.
    """

    observer: ObserverName = "moving_average"
    saturation_guard: bool = True
    float_layers: tuple[str, ...] = ()


class MeanSquaredErrorObserver(MovingAverageMinMaxObserver):  # type: ignore[misc]
    """Moving average of the symmetric range that rounds each batch with the least squared error.

    Ranges of 1/40 … 40/40 of the batch's largest magnitude are tried on at most 8,192 values, spread over the batch.
    """

    CANDIDATES, SAMPLES = 40, 8192

    def forward(self, x: Tensor) -> Tensor:
        values = x.detach().flatten().float()
        limit = values.abs().amax()
        # multiples of the golden ratio: a constant stride would meet the same columns of every image
        places = torch.arange(min(self.SAMPLES, values.numel()), device=x.device, dtype=torch.float64) * GOLDEN_RATIO % 1
        sample = values[(places * values.numel()).long()]
        ranges = limit * torch.arange(1, self.CANDIDATES + 1, device=x.device) / self.CANDIDATES
        steps = (2 * ranges / (self.quant_max - self.quant_min)).clamp(min=SMALLEST_SCALE)[:, None]
        rounded = torch.clamp(torch.round(sample / steps), self.quant_min, self.quant_max) * steps  # [candidates, samples]
        best = ranges[(rounded - sample).square().mean(1).argmin()]
        super().forward(torch.stack([-best, best]))
        return x


OBSERVERS: dict[ObserverName, tuple[type[MinMaxObserver], dict[str, float]]] = {
    "moving_average": (MovingAverageMinMaxObserver, {"averaging_constant": AVERAGING}),
    "min_max": (MinMaxObserver, {}),
    "mse": (MeanSquaredErrorObserver, {"averaging_constant": AVERAGING}),
}


class _Step(torch.autograd.Function):
    """A step size s = e^θ, always positive. θ's gradient is s's divided by s, so that descent on θ moves s as descent on s itself would (to first
    order), and an optimizer that normalises gradients moves it by a share of itself. s stays within 2^±24, where float32 divides exactly enough."""

    LARGEST_LOG = 24 * math.log(2)

    @staticmethod
    def forward(ctx: Any, log_step: Tensor) -> Tensor:
        step = log_step.clamp(-_Step.LARGEST_LOG, _Step.LARGEST_LOG).exp()
        ctx.save_for_backward(step)
        return step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (step,) = ctx.saved_tensors
        return gradients[0] / cast(Tensor, step)


class SiteFakeQuantize(FakeQuantize):  # type: ignore[misc]
    """A fake-quantiser that knows which tensor it stands on, and that may record the range only, or learn its scale.

    Learned step sizes follow LSQ (Esser et al., https://arxiv.org/abs/1902.08153): the gradient of section 2.1, scaled by 1/√(N·Q_P) as in section
    2.2, N the values an image has in the tensor, or the weights of an output channel. torchao's LearnableFakeQuantize has the same gradient, but
    counts the whole batch in N and lets a scale become negative.

    Attributes:
        tensor: key of the tensor, shared by all sites that read it.
        place: what an error calls it, as "the input of layer1.0.conv1".
        kind: "weight", "activation", or "range" for one that leaves the tensor as it is.
        log_step: logarithm of the scale while it is learned, else None.
    """

    log_step: nn.Parameter | None

    def __init__(self, *, tensor: str, place: str, kind: Literal["weight", "activation", "range"], **options: Any) -> None:
        super().__init__(**options)
        self.tensor, self.place, self.kind = tensor, place, kind
        self.register_parameter("log_step", None)
        self.enable_fake_quant()

    def learn(self) -> None:
        """From now on the scale is a parameter that starts at the observer's; a recorded range stays one."""
        if self.kind != "range":
            self.log_step = nn.Parameter(self.usable_scale().log())
            self.disable_observer()

    def forward(self, x: Tensor) -> Tensor:
        if self.log_step is None or not self.fake_quant_enabled[0]:
            return cast(Tensor, super().forward(x))
        step: Tensor = _Step.apply(self.log_step)
        self.scale.copy_(step.detach())
        low, high = self.activation_post_process.quant_min, self.activation_post_process.quant_max
        zero_point, factor = torch.zeros_like(step), (x[0].numel() * high) ** -0.5
        if self.is_per_channel:
            return torch._fake_quantize_learnable_per_channel_affine(x, step, zero_point, self.ch_axis, low, high, factor)
        return torch._fake_quantize_learnable_per_tensor_affine(x, step, zero_point, low, high, factor)

    def enable_observer(self, enabled: bool = True) -> None:
        super().enable_observer(enabled and self.log_step is None)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        super().enable_fake_quant(enabled and self.kind != "range")

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        observer = self.activation_post_process
        if not bool(torch.isfinite(observer.min_val).all() and torch.isfinite(observer.max_val).all()):
            raise StageFailed(f"{self.place} has NaN or infinite values", "check the images and the weights; in training, lower the stage's lr")
        return cast("tuple[Tensor, Tensor]", observer.calculate_qparams())

    def magnitude(self) -> Tensor:
        """Largest magnitude seen, per tensor [] or per channel [C]."""
        observer = self.activation_post_process
        return torch.maximum(observer.min_val.abs(), observer.max_val.abs())

    def usable_scale(self) -> Tensor:
        """Scales [1] or [C]. A channel of zeros is zero under any scale; its layer's largest keeps a bias in units of it within int32."""
        if self.log_step is not None or not self.is_per_channel:
            return cast(Tensor, self.scale)
        return torch.where(self.magnitude() > 0, self.scale, self.scale.max())


class PlacementQuantizer(Quantizer):  # type: ignore[misc]
    """Tells torchao where `nn.placement.layers` wants fake-quantisers and observers.

    Attributes:
        tensors: layer name → role → key of the tensor's `SiteFakeQuantize`; filled by `annotate`.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.tensors: dict[str, dict[str, str]] = {}
        self._specs: dict[str, QuantizationSpec] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        notes: dict[Node, QuantizationAnnotation] = {}
        found = layers(model.graph, self.scheme.float_layers)
        quantized = {tensor for layer in found for _, tensor, _ in layer.edges()}

        def note(node: Node) -> QuantizationAnnotation:
            return notes.setdefault(node, QuantizationAnnotation(_annotated=True))

        for layer in found:
            keys = self.tensors[layer.name] = {}
            for role, tensor, consumer in layer.edges():
                keys[role] = tensor.name
                note(consumer).input_qspec_map[tensor] = self._activation(layer, role, tensor, "activation")
                if role == "input":  # torchao's conv + BatchNorm rewrite reads this map by position: input, then weight
                    note(layer.node).input_qspec_map.setdefault(layer.node.args[0], None)  # of an input that is quantised before it is pooled or reshaped
                    keys["weight"] = f"{layer.name}.weight"
                    note(layer.node).input_qspec_map[layer.weight] = self._weight(layer)
            for role, tensor in layer.observed.items():
                keys[role] = tensor.name
                if tensor not in quantized:
                    note(tensor).output_qspec = self._activation(layer, role, tensor, "range")
        for node, annotation in notes.items():
            node.meta["quantization_annotation"] = annotation
        return model

    def validate(self, model: GraphModule) -> None:
        pass

    def _activation(self, layer: Layer, role: str, tensor: Node, kind: str) -> QuantizationSpec:
        observer, options = OBSERVERS[self.scheme.observer]
        constructor = SiteFakeQuantize.with_args(
            tensor=tensor.name, place=f"the {role} of '{layer.name}'", kind=kind, observer=observer, eps=SMALLEST_SCALE, **options
        )
        spec = QuantizationSpec(torch.int8, constructor, ACTIVATION_MIN, ACTIVATION_MAX, torch.per_tensor_symmetric)
        return self._specs.setdefault(tensor.name, spec)  # one tensor, one scale

    def _weight(self, layer: Layer) -> QuantizationSpec:
        limit = layer.weight_limit(self.scheme.saturation_guard)
        constructor = SiteFakeQuantize.with_args(
            tensor=f"{layer.name}.weight",
            place=f"the weight of '{layer.name}'",
            kind="weight",
            observer=MovingAveragePerChannelMinMaxObserver,
            averaging_constant=1.0,  # the weight's own range, of now
            eps=SMALLEST_SCALE,
        )
        return QuantizationSpec(torch.int8, constructor, -limit, limit, torch.per_channel_symmetric, ch_axis=0)


class Prepared(nn.Module):
    """A network's graph with fake-quantisers: float32 [N, C, H, W] → [N, K]. `train()`, `eval()` and `parameters()` work as on any module.

    In training, activations' ranges and BatchNorm's statistics move until frozen; in evaluation nothing moves. Weights' scales always follow
    the weights. The network given stays as it is: `write_back` brings it the trained weights.

    Raises:
        ExportFailed: torch.export cannot trace the network.
        StageFailed: it has no layer to quantise.
    """

    def __init__(self, network: Network, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.example = example_input(network.preprocessing)
        quantizer = PlacementQuantizer(scheme)
        self.graph_module: GraphModule = prepare_qat_pt2e(capture(network, self.example), quantizer)
        self.tensors = quantizer.tensors
        if not self.tensors:
            kept = " beside those that mixed_precision keeps in float" if scheme.float_layers else ""
            raise StageFailed(f"the network has no Conv2d or Linear layer to quantise{kept}")
        self.batchnorm_frozen = self.observers_frozen = False
        _restore_norms(self.graph_module, network)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.graph_module(x))

    def train(self, mode: bool = True) -> Prepared:
        self.training = mode  # not nn.Module.train: an exported graph holds the mode in its operators' arguments
        for node in self.graph_module.graph.nodes:
            if node.target in TRAINING_ARGUMENT:
                node.update_arg(TRAINING_ARGUMENT[node.target], mode and not (node.target is BATCH_NORM and self.batchnorm_frozen))
        self.graph_module.recompile()
        for site in self.fake_quantizers():
            site.enable_observer(site.kind == "weight" or (mode and not self.observers_frozen))
        return self

    def freeze_batchnorm(self) -> None:
        """From now on BatchNorm uses its running statistics, as the folded model will."""
        self.batchnorm_frozen = True
        self.train(self.training)

    def freeze_observers(self) -> None:
        """From now on activations' scales stay."""
        self.observers_frozen = True
        self.train(self.training)

    def learn_scales(self) -> None:
        """From now on the scales of weights and activations are parameters, trained with the weights (`SiteFakeQuantize.learn`). After `calibrate`."""
        for site in self.fake_quantizers():
            site.learn()

    def fake_quantizers(self) -> Iterator[SiteFakeQuantize]:
        return (m for m in self.graph_module.modules() if isinstance(m, SiteFakeQuantize))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Record the float network's ranges on float32 [N, C, H, W] batches. Leaves the module in evaluation mode.

        Raises:
            StageFailed: values that are not finite; all images constant or equal; a tensor that is always zero.
        """
        self.eval()
        for site in self.fake_quantizers():
            site.enable_observer()
            site.disable_fake_quant()
        first, images, differ, uneven = None, 0, False, False
        for batch in batches:
            first = batch[:1] if first is None else first
            images += len(batch)
            differ = differ or bool((batch != first).any())
            uneven = uneven or bool((first != first.flatten()[0]).any())
            self.graph_module(batch)
        if not (differ if images > 1 else uneven):
            found = {0: "found none", 1: "found one, which is constant"}.get(images, f"found {images} that are all the same")
            raise StageFailed(f"calibration needs images that differ: {found}", "check the data set, or raise calibration_images")
        for site in self.fake_quantizers():
            site.enable_fake_quant()
        self.eval()
        self.check()

    def check(self) -> None:
        """Raise StageFailed for a tensor that is always zero, or too small for a scale."""
        for site in self.fake_quantizers():
            largest = float(site.magnitude().max())
            if largest < SMALLEST_SCALE:
                found = "is always zero, so it has no scale" if largest == 0 else f"never exceeds {largest:.2g}, too little for a scale"
                raise StageFailed(f"{site.place} {found}", "train the network first, or prune the dead layer")

    @torch.no_grad()
    def sites(self) -> dict[str, dict[str, Any]]:
        """Scales by layer name and role, as `nn.quantizer` reads them. Leaves the module in evaluation mode.

        Raises:
            StageFailed: a tensor that is always zero or not finite.
        """
        self.eval()
        self(self.example.to(next(self.parameters()).device))  # weights moved after their scales were last taken
        self.check()
        found = {site.tensor: (site.usable_scale().tolist(), site.is_per_channel) for site in self.fake_quantizers()}
        scales = {tensor: values if per_channel else values[0] for tensor, (values, per_channel) in found.items()}
        return {name: {role: scales[key] for role, key in keys.items()} for name, keys in self.tensors.items()}

    def write_back(self, network: Network) -> None:
        """Give `network` the trained weights, which replace parametrised ones, BatchNorm statistics, and the lineage entry of its quantisation."""
        sites, own = self.sites(), self.graph_module.state_dict()
        parametrizations.remove(network)
        network.load_state_dict({name: own.get(name, value) for name, value in network.state_dict().items()})
        network.lineage.append({"op": "quantize", "sites": sites, "scheme": {**asdict(self.scheme), "float_layers": sorted(self.scheme.float_layers)}})


def _restore_norms(graph_module: GraphModule, network: nn.Module) -> None:
    """Give each BatchNorm its own momentum and epsilon: `prepare_qat_pt2e` writes PyTorch's defaults."""
    for node in graph_module.graph.nodes:
        if node.target is not BATCH_NORM or node.args[4] is None:  # without running statistics nothing was rewritten
            continue
        owner = network.get_submodule(parameter_owner(node.args[3]))
        momentum, eps = cast("float | None", owner.momentum), cast(float, owner.eps)
        if momentum is not None:
            node.update_arg(MOMENTUM_ARGUMENT, momentum)
        node.update_arg(EPS_ARGUMENT, eps)
        for user in list(node.args[4].users):
            if user.target in ADDS:  # √(running_var + eps) of the folded weight
                user.update_arg(1, eps)
    graph_module.recompile()
