"""Money: what devices cost, where the time of a run goes, and what that adds up to. Loads no torch."""

from ds_lightning.cost.audit import audit
from ds_lightning.cost.audit_report import audit_tables
from ds_lightning.cost.calibration import calibration_from_run
from ds_lightning.cost.ledger import Ledger
from ds_lightning.cost.ledger_report import ledger_report, ledger_table
from ds_lightning.cost.planner import plan
from ds_lightning.cost.prices import Hardware, Price, find_hardware, find_price, read_hardware, read_prices
from ds_lightning.cost.records import PHASES, LedgerFile, Totals, iter_ledger, read_ledger
from ds_lightning.cost.rl_stage import RLStage, plan_rl_stage
from ds_lightning.cost.scaling import plan_budget

__all__ = [
    "PHASES",
    "Hardware",
    "Ledger",
    "LedgerFile",
    "Price",
    "RLStage",
    "Totals",
    "audit",
    "audit_tables",
    "calibration_from_run",
    "find_hardware",
    "find_price",
    "iter_ledger",
    "ledger_report",
    "ledger_table",
    "plan",
    "plan_budget",
    "plan_rl_stage",
    "read_hardware",
    "read_ledger",
    "read_prices",
]
