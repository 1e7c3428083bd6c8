"""The parts of every wrapper of a Hugging Face model: attaching, capturing states, finding layers."""
