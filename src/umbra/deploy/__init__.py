"""Deploy a shadow: detached models, exported files, other packages' formats."""
