"""Demo that ``make demo`` runs."""
