"""Tables that firmware would leave in memory, beside ACPI's: SMBIOS and the MultiProcessor table."""
