"""What every wrapper of a Hugging Face model is made of: attaching, capturing states, finding layers."""
