"""From a checkpoint on disk to a module of a role, and what runs inside its forward."""
