"""Cases of whole models: training steps, inference, uncertainty steps; ``bench_model.py`` runs them."""
