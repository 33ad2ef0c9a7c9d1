"""The benchmark of scripts/bench: one module for each row; `harness` has rounds and results, `contenders` monitors."""
