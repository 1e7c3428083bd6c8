"""One page that shows what a memory does to each token of a text: fairseq-explore."""
