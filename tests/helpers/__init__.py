"""What tests share: small models, files, slow references. No test lives here."""

from pathlib import Path

TOP = Path(__file__).parents[2]
FIXTURES = TOP / "tests" / "fixtures"
