"""What `swift sft --external_plugins` names: it adds the tuner type `smoa`."""

import smoa.integrations.swift  # noqa: F401
