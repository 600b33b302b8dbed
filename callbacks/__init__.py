"""Lightning callbacks: when things happen. Formulas live in the layers below."""

if __name__ != "ds_lightning.callbacks":
    raise ImportError(f"imported as {__name__!r}: write 'from ds_lightning.callbacks import ...'")

from ds_lightning.callbacks.budget import Budget
from ds_lightning.callbacks.checkpoints import Checkpoints
from ds_lightning.callbacks.cost_ledger import CostLedger
from ds_lightning.callbacks.expert_load import ExpertLoad
from ds_lightning.callbacks.pass_at_one import PassAtOne
from ds_lightning.callbacks.preemption import Preemption
from ds_lightning.callbacks.progress_bar import ProgressBar
from ds_lightning.callbacks.replica_check import ReplicaCheck
from ds_lightning.callbacks.routing_bias import RoutingBias
from ds_lightning.callbacks.samples import Samples
from ds_lightning.callbacks.tensorboard_layout import TensorBoardLayout
from ds_lightning.callbacks.throughput import Throughput

__all__ = [
    "Budget",
    "Checkpoints",
    "CostLedger",
    "ExpertLoad",
    "PassAtOne",
    "Preemption",
    "ProgressBar",
    "ReplicaCheck",
    "RoutingBias",
    "Samples",
    "TensorBoardLayout",
    "Throughput",
]
