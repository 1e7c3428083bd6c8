"""What the programs with a web address share: where they listen, who may ask, how they start and stop."""
