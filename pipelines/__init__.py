"""The stream: from the log, through parse, encode and update, into the online store. The only folder with Beam."""
