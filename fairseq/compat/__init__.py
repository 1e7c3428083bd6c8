"""The border to scripts and plug-ins that are written for fairseq: its Python names as thin adapters over our parts."""
