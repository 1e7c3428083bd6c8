"""Commands that fetch texts and choose which of them meet in a batch."""
