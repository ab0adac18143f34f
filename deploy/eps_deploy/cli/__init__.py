"""The commands of eps_deploy, a module each."""
