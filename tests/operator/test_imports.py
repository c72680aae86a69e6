"""What the operator's image has for Jobs on stores costs the operator nothing."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("pyarrow", "numpy", "obstore", "deltalake", "boto3", "torch")


def test_the_operator_loads_neither_arrays_nor_tables_nor_clients_of_stores() -> None:
    code = "import sys, allele_operator.app, allele_operator.settings; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "kopf" in loaded
    assert not set(HEAVY) & set(loaded)
