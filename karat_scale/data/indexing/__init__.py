"""`karat index`: makes tars that others wrote readable like our shards, from their headers, without copying them."""
