"""The poster's diagnostic table: samplers compared on targets whose answers are known."""
