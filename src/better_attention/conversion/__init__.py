"""Conversion of existing models: from one mechanism to another, exactly where mathematics allows it."""
