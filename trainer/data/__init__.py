"""From files to tokens to batches: documents, token store, the ledger of samples."""
