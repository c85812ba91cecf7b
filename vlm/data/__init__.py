"""Step 3: from rows anywhere to a validated, decoded-once, exactly measured dataset on disk."""
