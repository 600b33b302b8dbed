"""DeepSpeed ZeRO on any device that Lightning knows, a CPU included."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ds_lightning.models import DeepSeek
from ds_lightning.models.init import init_layer
from ds_lightning.optim import Muon
from ds_lightning.optim.sharded_matrices import Sharding
from ds_lightning.training import checkpoint, shards
from ds_lightning.training.precision import ZeROPrecision
from ds_lightning.training.reshard import load_resharded
from ds_lightning.training.zero_config import deepspeed_config, fit_buckets


class ZeRO(DeepSpeedStrategy):
    """Data parallelism that shards what each rank would otherwise hold in full (arXiv:1910.02054).

    Stage 1 shards the optimizer's states, stage 2 the gradients too, stage 3 the weights too. Gradients accumulate in
    fp32. Runs on CUDA with NCCL, and on a CPU with gloo, where a laptop rehearses what a cluster will run.

    Differs from Lightning's strategy in what :class:`ZeROPrecision` does, in checkpoints whose failure on one rank
    does not make the others wait, and under stage 3 in weights: they are drawn and loaded as in any other run.

    Args:
        stage: What is sharded.
        offload_optimizer: Keep the optimizer's states in the host's memory, and step there.
        timeout_seconds: How long ranks wait for one another before the run fails.
        config: More keys of DeepSpeed's own config, over those set here.

    Raises:
        ValueError: If there is no such stage, or the config has a key that DeepSpeed does not know or others set.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        *,
        offload_optimizer: bool = False,
        timeout_seconds: float = 600.0,
        config: dict[str, Any] | None = None,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO: stage is {stage!r}, expected 1, 2 or 3")
        if not timeout_seconds > 0:
            raise ValueError(f"ZeRO: timeout_seconds is {timeout_seconds}, expected more than 0")
        shards.import_deepspeed()
        self.stage: int = stage
        self._trained: Any = None  # the engine of a fit, for the validation after it
        super().__init__(config=deepspeed_config(stage, config or {}, offload_optimizer=offload_optimizer))
        self._timeout = timedelta(seconds=timeout_seconds)

    @property
    def precision_plugin(self) -> Precision:
        """Ours, in place of the one that the trainer makes for any strategy of DeepSpeed's."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) is DeepSpeedPrecision:
            plugin = ZeROPrecision(plugin.precision)
        self._precision_plugin = plugin

    def setup_environment(self) -> None:
        """Start the processes; Lightning's own refuses a CPU."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Let the processes find one another."""
        reset_seed()
        self.set_world_ranks()
        if self.root_device.type == "cpu":
            _use_cpu()
        self._init_deepspeed_distributed()

    @contextmanager
    def whole(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Hold these parameters in full on every rank; what rank 0 writes into them is what all keep."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
            yield

    @contextmanager
    def together(self, model: DeepSeek) -> Iterator[DeepSeek]:
        """Bring the weights of a model together once, for forwards without gradient that ranks make by themselves.

        Yields:
            The model, or under stage 3 one of the same weights in full. It has none of DeepSpeed's hooks, which would
            bring them together layer by layer, with all ranks, in every forward.
        """
        if self.stage < 3:
            yield model
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            with torch.device("meta"):
                whole = DeepSeek(model.config)
            whole.load_state_dict(model.state_dict(), assign=True)
            yield whole

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Build modules that are not sharded, within ``configure_model``."""
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

        shutdown_init_context()
        try:
            yield
        finally:
            restore_init_context()

    @torch.no_grad()
    def draw(self, model: nn.Module, std: float) -> None:
        """Give a sharded model the weights that its constructor would have drawn, layer by layer.

        DeepSpeed takes weights away as soon as a layer is made, and makes buffers in the precision of weights.
        """
        if self.stage < 3:
            return
        for layer in model.modules():
            with self.whole(layer.parameters(recurse=False)):
                init_layer(layer, std)
            for name, buffer in layer.named_buffers(recurse=False):
                layer.register_buffer(name, buffer.float() if buffer.is_floating_point() else buffer)

    @torch.no_grad()
    def copy(self, source: nn.Module, target: nn.Module) -> None:
        """Give a model the weights and buffers of another that is sharded in the same way."""
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            with self.whole([theirs, ours]):
                ours.copy_(theirs)
        for name, buffer in source.named_buffers():
            target.get_buffer(name).copy_(buffer)

    @torch.no_grad()
    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy whole weights and buffers into a model that may be sharded.

        Args:
            model: The model.
            state: Its state, in full, on every rank.
        """
        for name, parameter in model.named_parameters():
            with self.whole([parameter]):
                if self.stage < 3 or self.is_global_zero:
                    parameter.copy_(state[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed

        engine, optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self._device_rank),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer

    def init_deepspeed(self) -> None:
        """Make the engine; of a model that has one from its fit, take that.

        Raises:
            ValueError: If the module makes its optimizer steps itself.
        """
        assert self.lightning_module is not None
        assert isinstance(self.config, dict)
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            if not self.lightning_module.automatic_optimization:  # the others are lost without a word
                raise ValueError(
                    "model: automatic_optimization is False, and of several backward passes before such a step ZeRO "
                    "keeps the last one's gradient alone, expected True: let training_step return the loss of a "
                    "micro-batch, and set trainer.accumulate_grad_batches"
                )
            fit_buckets(self.config, self.lightning_module)
            self._initialize_deepspeed_train(self.lightning_module)
            shards.detach_failures(self.model)
            self._share_matrices()
            self._register_head(self.lightning_module)
            self._move_rest(self.lightning_module)
            self._trained = self.model
        elif self._trained is not None and self._trained.module is self.lightning_module:
            self.model = self._trained
            self.model_to_device()
        else:
            self._initialize_deepspeed_inference(self.model)
            self._move_rest(self.lightning_module)

    def _register_head(self, module: Any) -> None:
        """Tell stage 3 that losses use the head's weight beside its module.

        It would learn that in the first forward, too late for the order of weights that it notes there: without a
        validation before it, as in a run that goes on, a later step would find another order and fail.
        """
        if self.stage == 3 and isinstance(getattr(module, "model", None), DeepSeek):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, module.model.lm_head.weight)

    def _move_rest(self, module: nn.Module) -> None:
        """Move what has no weights, such as metrics: stage 3 makes weights on the device, and moves nothing there."""
        for child in module.children():
            if next(child.parameters(), None) is None:
                child.to(self.root_device)

    def _share_matrices(self) -> None:
        """Tell Muon where in the flat tensors that it steps on the matrices are."""
        engine: Any = self.model
        if not isinstance(engine.optimizer.optimizer, Muon):
            return
        shapes = engine._get_zero_param_shapes()
        cuts = shards.cuts(shapes, self.stage, self.world_size)
        contents = {
            flat: [(cut, tuple(group_shapes[name])) for name, cut in group_cuts.items()]
            for flat, group_shapes, group_cuts in zip(shards.flat_tensors(engine), shapes, cuts, strict=True)
        }
        engine.optimizer.optimizer.sharding = Sharding(contents, self.global_rank, self.world_size, self.root_device)

    def _initialize_deepspeed_inference(self, model: Any) -> None:
        import deepspeed

        assert isinstance(self.config, dict)
        kept = ["train_micro_batch_size_per_gpu", "fp16", "bf16", *(["zero_optimization"] if self.stage == 3 else [])]
        self.model, _, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self._device_rank),
            config={key: self.config[key] for key in kept if key in self.config},
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )

    @property
    def _device_rank(self) -> int:
        return self.local_rank if self.root_device.index is None else self.root_device.index

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: the weights are in the shards."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: the optimizer's states are in the shards."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write this rank's shards, and from rank 0 the rest of the state.

        Raises:
            OSError: If this rank's files cannot be written; the other ranks do not wait for them.
        """
        shards.save(self.model, checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read this rank's shards, from those of other ranks where it is other ranks that wrote them.

        The checkpoint must have been verified, since DeepSpeed unpickles it.

        Returns:
            What ``save_checkpoint`` was given on rank 0.
        """
        assert self.lightning_module is not None
        folder = Path(checkpoint_path)
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            ranks, stage = checkpoint.layout(folder.parent)
            if (ranks, stage) == (self.world_size, self.stage):
                return shards.load(self.model, folder)
            return load_resharded(self.model, folder, ranks=ranks, stage=stage)
        self.load(self.lightning_module, shards.whole_state(folder))
        return shards.load_client_state(folder)


def zero_stage(strategy: Any) -> int:
    """Return how a strategy shards the state of a run; 0: not at all."""
    return strategy.stage if isinstance(strategy, ZeRO) else 0


def whole_weights(strategy: Any, model: Any) -> AbstractContextManager[DeepSeek]:
    """Hold a model's weights in full on every rank, under any strategy: :meth:`ZeRO.together`."""
    return strategy.together(model) if isinstance(strategy, ZeRO) else nullcontext(model)


def _use_cpu() -> None:
    """Run DeepSpeed on the CPU, also where there is a GPU, with torch's own communication."""
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    set_accelerator(CPU_Accelerator())
    # Its reduction in shared memory serves inference alone, and takes a compiler and a minute to build.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
