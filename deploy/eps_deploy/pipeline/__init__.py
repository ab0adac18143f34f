"""The steps of `eps-deploy`, from a compact network to a bundle."""
