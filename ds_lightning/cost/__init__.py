"""Money: what devices cost, where the time of a run goes, and what that adds up to. Loads no torch."""

from ds_lightning.cost.audit import audit
from ds_lightning.cost.audit_report import audit_tables
from ds_lightning.cost.ledger import Ledger
from ds_lightning.cost.ledger_report import ledger_report, ledger_table
from ds_lightning.cost.prices import Hardware, Price, find_hardware, find_price, read_hardware, read_prices
from ds_lightning.cost.records import PHASES, LedgerFile, Totals, iter_ledger, read_ledger

__all__ = [
    "PHASES",
    "Hardware",
    "Ledger",
    "LedgerFile",
    "Price",
    "Totals",
    "audit",
    "audit_tables",
    "find_hardware",
    "find_price",
    "iter_ledger",
    "ledger_report",
    "ledger_table",
    "read_hardware",
    "read_ledger",
    "read_prices",
]
