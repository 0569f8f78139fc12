"""One branch in the making: its shards, its ledger, everything beside its weights."""
